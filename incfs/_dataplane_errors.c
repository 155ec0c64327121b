/* What the control plane is told when the native data plane refuses: the exceptions of incfs/dataplane.py. */
#include "_dataplane.h"

struct dataplane_python python;

/* Raises type(*arguments), where type is an exception class; steals arguments. */
static PyObject *raise(PyObject *type, PyObject *arguments)
{
    PyObject *error = arguments ? PyObject_Call(type, arguments, NULL) : NULL;
    if (error)
        PyErr_SetObject(type, error);
    Py_XDECREF(error);
    Py_XDECREF(arguments);
    return NULL;
}

/* Raises what self.method(*arguments) returns; steals arguments. */
PyObject *raise_made(DataPlane *self, const char *method, PyObject *arguments)
{
    PyObject *maker = PyObject_GetAttrString((PyObject *)self, method);
    PyObject *error = maker && arguments ? PyObject_Call(maker, arguments, NULL) : NULL;
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    Py_XDECREF(maker);
    Py_XDECREF(arguments);
    return NULL;
}

PyObject *file_of(DataPlane *self, uint64_t address)
{
    PyObject *id = PyLong_FromUnsignedLong(address >> 48);
    PyObject *file = id ? PyObject_GetItem(self->files, id) : NULL;
    Py_XDECREF(id);
    return file;
}

static PyObject *raise_would_wait(DataPlane *self, const struct plane_refusal *why)
{
    PyObject *file = file_of(self, why->address);
    if (!file)
        return NULL;
    return raise(python.read_would_wait, Py_BuildValue("(NKK)", file,
                                                       (unsigned long long)why->address & 0xFFFFFFFFFFFFull,
                                                       (unsigned long long)why->block_count));
}

PyObject *raise_status(DataPlane *self, enum plane_status status, uint64_t map_id,
                       const struct plane_refusal *why)
{
    unsigned long long map = map_id, address = why->address;
    switch (status) {
    case PLANE_NOT_RESIDENT:
        return raise(python.not_resident, Py_BuildValue("(KK)", map, (unsigned long long)why->page_index));
    case PLANE_NO_LEASE:
        return raise(python.lease_exhausted, Py_BuildValue("(KK)", map | (unsigned long long)why->column,
                                                           (unsigned long long)why->block_count));
    case PLANE_WOULD_WAIT:
        return raise_would_wait(self, why);
    case PLANE_MISMATCH:
        return raise_made(self, "_mismatch_error",
                          Py_BuildValue("(KKKII)", map, (unsigned long long)why->virtual_block, address, why->found,
                                        why->expected));
    case PLANE_READ_ERROR:
        return raise_made(self, "_host_error", Py_BuildValue("(sKi)", "read", address, why->host_errno));
    case PLANE_WRITE_ERROR:
        return raise_made(self, "_host_error", Py_BuildValue("(sKi)", "write", address, why->host_errno));
    case PLANE_LEG_ERROR:
        return raise(python.leg_failed, Py_BuildValue("(KIi)", address >> 48, why->leg, why->host_errno));
    default:
        return PyErr_NoMemory();
    }
}

/* ---- Names of the control plane ----------------------------------------------------------------- */

static int import_names(const char *module_name, int count, const char *const *names, PyObject ***slots)
{
    PyObject *module = PyImport_ImportModule(module_name);
    for (int i = 0; module && i < count; i++)
        if (!(*slots[i] = PyObject_GetAttrString(module, names[i])))
            Py_CLEAR(module);
    if (!module)
        return -1;
    Py_DECREF(module);
    return 0;
}

int import_python(void)
{
    static const char *const of_dataplane[] = {"NotResident", "LeaseExhausted", "ReadWouldWait", "Batch",
                                              "LegFailed"};
    PyObject **dataplane_slots[] = {&python.not_resident, &python.lease_exhausted, &python.read_would_wait,
                                    &python.batch, &python.leg_failed};
    static const char *const of_sealed[] = {"Sealed"}, *const of_array[] = {"array"};
    PyObject **sealed_slots[] = {(PyObject **)&python.sealed}, **array_slots[] = {&python.array};
    if (import_names("incfs.dataplane", 5, of_dataplane, dataplane_slots) < 0)
        return -1;
    return import_names("incfs.sealed", 1, of_sealed, sealed_slots) < 0 ? -1
                                                                        : import_names("array", 1, of_array, array_slots);
}
