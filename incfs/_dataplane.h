/* What the files of incfs._dataplane share: the Python type and its methods. */
#ifndef INCFS_DATAPLANE_H
#define INCFS_DATAPLANE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "hot.h"
#include "lane.h"
#include "plane.h"

typedef struct {
    PyObject_HEAD
    struct plane *plane;
    struct lane *lane;
    uint32_t block_bytes;
    PyObject *files; /* Mapping[StorageId, BlockFile] */
} DataPlane;

/* ---- _dataplane_errors.c -------------------------------------------------------------------------------- */

/* What the control plane is told with; see incfs/nativeplane.py for the makers of errors. */
struct dataplane_python {
    PyObject *not_resident, *lease_exhausted, *read_would_wait, *leg_failed; /* incfs.dataplane */
    PyObject *batch;
    PyTypeObject *sealed; /* incfs.sealed; a named tuple */
    PyObject *array;      /* array.array */
};

extern struct dataplane_python python;

/* Fills `python`; -1 with an error set. */
int import_python(void);

/* Raises what self.method(*arguments) returns; steals arguments. */
PyObject *raise_made(DataPlane *self, const char *method, PyObject *arguments);
PyObject *raise_status(DataPlane *self, enum plane_status status, uint64_t map_id, const struct plane_refusal *why);

/* The file that an address lies in; a new reference. */
PyObject *file_of(DataPlane *self, uint64_t address);

/* Appends what was made, unless that failed; the error stays set. */
static inline void append_new(PyObject *list, PyObject *made)
{
    if (made)
        PyList_Append(list, made);
    Py_XDECREF(made);
}

/* ---- Methods: _dataplane_pages.c -------------------------------------------------------------------------- */

PyObject *method_load(DataPlane *self, PyObject *args, PyObject *kwargs);
PyObject *method_evict(DataPlane *self, PyObject *arg);
PyObject *method_shrink(DataPlane *self, PyObject *arg);
PyObject *method_is_resident(DataPlane *self, PyObject *args);
PyObject *method_grant(DataPlane *self, PyObject *args);
PyObject *method_revoke(DataPlane *self, PyObject *args);
PyObject *method_leased_blocks(DataPlane *self, PyObject *arg);
PyObject *method_attach(DataPlane *self, PyObject *arg);
PyObject *method_stripe(DataPlane *self, PyObject *args);
PyObject *method_move(DataPlane *self, PyObject *args);
PyObject *get_page_count(DataPlane *self, void *closure);

/* ---- Methods: _dataplane_served.c -------------------------------------------------------------------------- */

PyObject *method_serve(DataPlane *self, PyObject *args, PyObject *kwargs);
PyObject *method_unserve(DataPlane *self, PyObject *arg);
PyObject *method_freeze(DataPlane *self, PyObject *unused);
PyObject *method_watch(DataPlane *self, PyObject *arg);
PyObject *method_attend(DataPlane *self, PyObject *unused);
PyObject *method_written(DataPlane *self, PyObject *unused);
PyObject *method_server(DataPlane *self, PyObject *unused);
PyObject *method_lend(DataPlane *self, PyObject *args, PyObject *kwargs);
PyObject *method_reopen(DataPlane *self, PyObject *unused);
PyObject *method_left(DataPlane *self, PyObject *unused);
PyObject *method_stop(DataPlane *self, PyObject *unused);
PyObject *method_reclaim(DataPlane *self, PyObject *unused);
PyObject *method_close_journal(DataPlane *self, PyObject *unused);
PyObject *method_sync(DataPlane *self, PyObject *arg);
PyObject *method_divert(DataPlane *self, PyObject *args);
PyObject *method_set_folded(DataPlane *self, PyObject *arg);
PyObject *get_lent_end_bytes(DataPlane *self, void *closure);

/* ---- Methods: _dataplane_seal.c ---------------------------------------------------------------------------- */

PyObject *method_take_committed(DataPlane *self, PyObject *unused);
PyObject *method_seal(DataPlane *self, PyObject *unused);
PyObject *method_mapped_delta(DataPlane *self, PyObject *arg);
PyObject *get_fresh_count(DataPlane *self, void *closure);
PyObject *get_seal_count(DataPlane *self, void *closure);
PyObject *get_durable_sequence(DataPlane *self, void *closure);
PyObject *method_settle(DataPlane *self, PyObject *unused);
PyObject *method_inspect(DataPlane *self, PyObject *unused);

#endif
