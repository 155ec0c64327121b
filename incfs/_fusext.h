/* What the files of incfs._fusext share.  The rules are at the top of _fusext.c. */
#ifndef INCFS_FUSEXT_H
#define INCFS_FUSEXT_H

#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 312
#include <Python.h>

#include "fuse_hot.h"
#include "fuse_init.h"

#include <fuse_lowlevel.h>

/* libfuse 3.17 turned the name into a macro that calls the versioned function below; both stay
 * exported by every libfuse that has them, and pyfuse3 calls the one of the headers it was built with. */
#undef fuse_session_new
struct libfuse_version;

#define EXPORTED __attribute__((visibility("default")))

EXPORTED struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
                                               size_t ops_size, void *userdata);
EXPORTED struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
                                                         size_t ops_size, struct libfuse_version *version,
                                                         void *userdata);
EXPORTED void fuse_session_destroy(struct fuse_session *session);
EXPORTED int fuse_session_mount(struct fuse_session *session, const char *mountpoint);
EXPORTED int fuse_session_fd(struct fuse_session *session);
EXPORTED int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buffer);

/* ---- _fusext_libfuse.c ------------------------------------------------------------------------------------- */

typedef struct fuse_session *session_new_fn(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
typedef struct fuse_session *session_new_versioned_fn(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                                      struct libfuse_version *, void *);

struct libfuse {
    session_new_fn *session_new;
    session_new_versioned_fn *session_new_versioned; /* NULL before libfuse 3.17 */
    void (*session_destroy)(struct fuse_session *);
    int (*session_mount)(struct fuse_session *, const char *);
    int (*reply_err)(fuse_req_t, int);
    int (*reply_lseek)(fuse_req_t, off_t);
    int (*reply_write)(fuse_req_t, size_t);
    const struct fuse_ctx *(*req_ctx)(fuse_req_t);
    int (*version)(void);
    init_custom_io session_custom_io; /* NULL: not of this shape */
    struct hot_libfuse hot;
};

extern struct libfuse libfuse;

/* The path of the libfuse3 in this process, to be freed; NULL when there is none. */
char *libfuse_path(void);
/* Fills `libfuse`; returns 0 and says why on stderr when it cannot. */
int find_libfuse(void);

/* ---- _fusext_request.c ------------------------------------------------------------------------------------- */

/* Makes the type of requests known to the module; -1 with an error set. */
int add_request_type(PyObject *module);
/* A session was created: what is handed over before Python is ready gets the answer for that. */
void begin_dispatch(void);
/* Answers every pending request with EIO; the objects live on and ignore replies. */
void close_pending(void);
void op_lseek(fuse_req_t req, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *file);
void op_fallocate(fuse_req_t req, fuse_ino_t inode, int mode, off_t offset, off_t length,
                  struct fuse_file_info *file);
void op_copy_file_range(fuse_req_t req, fuse_ino_t inode_in, off_t offset_in, struct fuse_file_info *file_in,
                        fuse_ino_t inode_out, off_t offset_out, struct fuse_file_info *file_out, size_t length,
                        int flags);

PyObject *module_start(PyObject *module, PyObject *callable);
PyObject *module_stop(PyObject *module, PyObject *unused);

/* ---- _fusext_session.c ------------------------------------------------------------------------------------- */

PyObject *module_configure(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *module_start_hot(PyObject *module, PyObject *capsule);
PyObject *module_stop_hot(PyObject *module, PyObject *unused);
PyObject *module_is_hot(PyObject *module, PyObject *unused);
PyObject *module_has_session(PyObject *module, PyObject *unused);
PyObject *module_negotiated(PyObject *module, PyObject *unused);

#endif
