/* incfs._mappings: mappings as the owner thread and a checkpoint handle them by the hundred thousand.
 *
 * All of it runs with the interpreter's lock, a few microseconds at a time.
 */
#include "_mappings.h"

static PyObject *encoded(const struct mappings *page)
{
    uint8_t target[MAPPINGS_MAX_BYTES];
    return PyBytes_FromStringAndSize((const char *)target, (Py_ssize_t)mappings_encode(page, target));
}

static int decoded(const char *data, Py_ssize_t length, struct mappings *page)
{
    const char *wrong = mappings_decode(page, (const uint8_t *)data, (size_t)length);
    if (wrong)
        PyErr_SetString(PyExc_ValueError, wrong);
    return wrong ? -1 : 0;
}

static PyObject *function_decode(PyObject *module, PyObject *data)
{
    (void)module;
    char *bytes;
    Py_ssize_t length;
    struct mappings page;
    if (PyBytes_AsStringAndSize(data, &bytes, &length) < 0 || decoded(bytes, length, &page) < 0)
        return NULL;
    return make_entries(&page);
}

static PyObject *function_fold(PyObject *module, PyObject *args)
{
    (void)module;
    const char *stored;
    Py_ssize_t length;
    PyObject *above;
    int keep_inherited;
    struct mappings page = {.count = 0};
    if (!PyArg_ParseTuple(args, "z#O!p", &stored, &length, page_type, &above, &keep_inherited) ||
        (stored && decoded(stored, length, &page) < 0))
        return NULL;
    mappings_put(&page, ((Page *)above)->of, ((Page *)above)->count);
    if (!keep_inherited)
        mappings_drop_inherited(&page);
    return page.count ? encoded(&page) : Py_NewRef(Py_None);
}

static PyMethodDef module_methods[] = {
    {"decode", function_decode, METH_O, "Give the mappings of a page, encoded as docs/FORMAT.md says; ValueError says what is wrong."},
    {"fold", function_fold, METH_VARARGS, "Encode a page as it is with changes above what is stored; None: it is empty."},
    {"displace", function_displace, METH_VARARGS, "Part replaced mappings into those that an increment lacks, and the others."},
    {"stored", function_stored, METH_O, "Give the addresses that are those of stored blocks."},
    {"groups", function_groups, METH_VARARGS, "Sort addresses into groups."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "incfs._mappings",
    .m_doc = "Mappings by the hundred thousand.",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__mappings(void)
{
    PyObject *module = PyModule_Create(&module_definition);
    page_type = module ? (PyTypeObject *)PyType_FromSpec(&page_spec) : NULL;
    if (!page_type || PyModule_AddObjectRef(module, "Page", (PyObject *)page_type) < 0)
        Py_CLEAR(module);
    return module;
}
