/* What the files of incfs._mappings share. */
#ifndef INCFS__MAPPINGS_H
#define INCFS__MAPPINGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "mappings.h"

typedef struct {
    PyObject_HEAD
    size_t count;
    struct mapping *of; /* as in struct mappings */
} Page;

/* ---- _mappings_page.c: the type ------------------------------------------------------------------------ */

extern PyType_Spec page_spec;
extern PyTypeObject *page_type;

/* A new dict. */
PyObject *make_entries(const struct mappings *page);

/* (known, slots, addresses, checksums, first, end) -> (Page, known, freed) */
PyObject *function_displace(PyObject *module, PyObject *args);

/* ---- _mappings_addresses.c ----------------------------------------------------------------------------- */

PyObject *function_stored(PyObject *module, PyObject *addresses);
PyObject *function_groups(PyObject *module, PyObject *args);

#endif
