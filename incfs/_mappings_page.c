/* incfs._mappings.Page: mappings of one page that no checkpoint has stored, 16 bytes each. */
#include "_mappings.h"

#include <stdbool.h>
#include <string.h>

PyTypeObject *page_type;

/* ---- What comes from Python ------------------------------------------------------------------------- */

/* Parts of three columns of one length. */
struct columns {
    Py_buffer slots, addresses, checksums;
    Py_ssize_t first, end;
};

static void release_columns(struct columns *columns)
{
    PyBuffer_Release(&columns->slots);
    PyBuffer_Release(&columns->addresses);
    PyBuffer_Release(&columns->checksums);
}

/* Copies the mappings of the columns; they must be a page's, ascending. */
static int read_columns(const struct columns *columns, struct mappings *into)
{
    Py_ssize_t first = columns->first, count = columns->end - first, length = columns->slots.len / 2;
    if (first < 0 || count < 0 || count > PLANE_PAGE_BLOCKS || columns->end > length ||
        columns->addresses.len / 8 != length || columns->checksums.len / 4 != length) {
        PyErr_SetString(PyExc_ValueError, "columns of different lengths");
        return -1;
    }
    const uint16_t *slots = (const uint16_t *)columns->slots.buf + first;
    const uint64_t *addresses = (const uint64_t *)columns->addresses.buf + first;
    const uint32_t *checksums = (const uint32_t *)columns->checksums.buf + first;
    into->count = (size_t)count;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (slots[i] >= PLANE_PAGE_BLOCKS || (i && slots[i] <= slots[i - 1])) {
            PyErr_SetString(PyExc_ValueError, "not the blocks of a page, ascending");
            return -1;
        }
        into->of[i] = (struct mapping){addresses[i], checksums[i], slots[i]};
    }
    return 0;
}

static int compare_mappings(const void *left, const void *right)
{
    return (int)((const struct mapping *)left)->index - (int)((const struct mapping *)right)->index;
}

static int read_dict(PyObject *entries, struct mappings *into)
{
    PyObject *key, *value;
    Py_ssize_t position = 0;
    bool is_sorted = true;
    into->count = 0;
    while (PyDict_Next(entries, &position, &key, &value)) {
        unsigned long index = PyLong_AsUnsignedLong(key);
        bool is_entry = index < PLANE_PAGE_BLOCKS && PyTuple_Check(value) && PyTuple_GET_SIZE(value) == 2;
        unsigned long long address = is_entry ? PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(value, 0)) : 0;
        unsigned long long checksum = is_entry ? PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(value, 1)) : 0;
        if (!PyErr_Occurred() && (!is_entry || checksum > UINT32_MAX))
            PyErr_SetString(PyExc_ValueError, "not mappings of a page");
        if (PyErr_Occurred())
            return -1;
        is_sorted = is_sorted && (!into->count || into->of[into->count - 1].index < index);
        into->of[into->count++] = (struct mapping){address, (uint32_t)checksum, (uint16_t)index};
    }
    if (!is_sorted)
        qsort(into->of, into->count, sizeof *into->of, compare_mappings);
    return 0;
}

/* Copies what a Page or a dict has; -1 with an error set. */
static int read_entries(PyObject *entries, struct mappings *into)
{
    if (Py_IS_TYPE(entries, page_type)) {
        into->count = ((Page *)entries)->count;
        memcpy(into->of, ((Page *)entries)->of, into->count * sizeof *into->of);
        return 0;
    }
    if (PyDict_Check(entries))
        return read_dict(entries, into);
    PyErr_Format(PyExc_TypeError, "mappings are a dict or a Page, not %s", Py_TYPE(entries)->tp_name);
    return -1;
}

/* ---- What goes to Python ---------------------------------------------------------------------------- */

static int add_entries(PyObject *dict, const struct mapping *of, size_t count)
{
    for (size_t i = 0; i < count && !PyErr_Occurred(); i++) {
        PyObject *key = PyLong_FromLong(of[i].index);
        PyObject *value = Py_BuildValue("(KI)", (unsigned long long)of[i].address, (unsigned)of[i].checksum);
        if (key && value)
            PyDict_SetItem(dict, key, value);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    return PyErr_Occurred() ? -1 : 0;
}

PyObject *make_entries(const struct mappings *page)
{
    PyObject *dict = PyDict_New();
    if (dict && add_entries(dict, page->of, page->count) < 0)
        Py_CLEAR(dict);
    return dict;
}

/* ---- The type --------------------------------------------------------------------------------------- */

static int page_put(Page *self, const struct mapping *above, size_t count)
{
    struct mappings merged = {.count = self->count};
    memcpy(merged.of, self->of, self->count * sizeof *self->of);
    mappings_put(&merged, above, count);
    if (merged.count > self->count) {
        struct mapping *grown = PyMem_Realloc(self->of, merged.count * sizeof *grown);
        if (!grown) {
            PyErr_NoMemory();
            return -1;
        }
        self->of = grown;
    }
    self->count = merged.count;
    memcpy(self->of, merged.of, merged.count * sizeof *self->of);
    return 0;
}

static PyObject *page_of(const struct mappings *page)
{
    Page *made = (Page *)page_type->tp_alloc(page_type, 0);
    if (made && page_put(made, page->of, page->count) < 0)
        Py_CLEAR(made);
    return (PyObject *)made;
}

static PyObject *page_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)type;
    PyObject *entries = NULL;
    struct mappings page = {.count = 0};
    if ((kwargs && PyDict_GET_SIZE(kwargs)) || !PyArg_ParseTuple(args, "|O", &entries)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "Page takes mappings, by position");
        return NULL;
    }
    return entries && read_entries(entries, &page) < 0 ? NULL : page_of(&page);
}

static void page_dealloc(Page *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyMem_Free(self->of);
    type->tp_free(self);
    Py_DECREF(type);
}

static Py_ssize_t page_length(Page *self)
{
    return (Py_ssize_t)self->count;
}

static PyObject *page_append(Page *self, PyObject *args)
{
    struct columns columns;
    struct mappings read;
    if (!PyArg_ParseTuple(args, "y*y*y*nn", &columns.slots, &columns.addresses, &columns.checksums, &columns.first,
                          &columns.end))
        return NULL;
    int failed = read_columns(&columns, &read);
    release_columns(&columns);
    if (failed || page_put(self, read.of, read.count) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *page_update(Page *self, PyObject *entries)
{
    struct mappings read;
    if (read_entries(entries, &read) < 0 || page_put(self, read.of, read.count) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *page_over(Page *self, PyObject *below)
{
    PyObject *dict = PyDict_Copy(below);
    if (dict && add_entries(dict, self->of, self->count) < 0)
        Py_CLEAR(dict);
    return dict;
}

static PyMethodDef page_methods[] = {
    {"append", (PyCFunction)page_append, METH_VARARGS, "Let the mappings from first to end of three columns replace those before."},
    {"update", (PyCFunction)page_update, METH_O, "The same with a dict, or with another Page."},
    {"over", (PyCFunction)page_over, METH_O, "Give a dict of other mappings with these above them."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot page_slots[] = {
    {Py_tp_doc, "Mappings of one page, each block once."},
    {Py_tp_new, page_new},
    {Py_tp_dealloc, page_dealloc},
    {Py_tp_methods, page_methods},
    {Py_sq_length, page_length},
    {0, NULL},
};

PyType_Spec page_spec = {
    .name = "incfs._mappings.Page",
    .basicsize = sizeof(Page),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = page_slots,
};

/* ---- Increments ------------------------------------------------------------------------------------- */

PyObject *function_displace(PyObject *module, PyObject *args)
{
    (void)module;
    const char *bits;
    Py_ssize_t length;
    struct columns columns;
    if (!PyArg_ParseTuple(args, "y#y*y*y*nn", &bits, &length, &columns.slots, &columns.addresses, &columns.checksums,
                          &columns.first, &columns.end))
        return NULL;
    struct mappings replaced, kept = {.count = 0};
    uint8_t known[PLANE_PAGE_BLOCKS / 8];
    uint64_t freed[PLANE_PAGE_BLOCKS];
    size_t freed_count = 0;
    int failed = read_columns(&columns, &replaced);
    release_columns(&columns);
    if (!failed && length != sizeof known) {
        PyErr_SetString(PyExc_ValueError, "not the bit set of a page");
        failed = -1;
    }
    if (failed)
        return NULL;
    memcpy(known, bits, sizeof known);
    for (size_t i = 0; i < replaced.count; i++) {
        struct mapping *mapping = &replaced.of[i];
        uint8_t mask = (uint8_t)(1 << mapping->index % 8);
        if (!(known[mapping->index / 8] & mask))
            kept.of[kept.count++] = *mapping;
        else if (mapping->address > PLANE_HOLE)
            freed[freed_count++] = mapping->address;
        known[mapping->index / 8] |= mask;
    }
    return Py_BuildValue("(Ny#y#)", page_of(&kept), known, (Py_ssize_t)sizeof known, freed, (Py_ssize_t)(8 * freed_count));
}
