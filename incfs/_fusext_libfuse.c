/* libfuse as pyfuse3 loaded it. */
#define _GNU_SOURCE
#include "_fusext.h"

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct libfuse libfuse;

/* Called for each loaded object; keeps the path of the one that is libfuse3. */
static int is_libfuse(struct dl_phdr_info *info, size_t size, void *found)
{
    (void)size;
    const char *slash = strrchr(info->dlpi_name, '/');
    const char *base = slash ? slash + 1 : info->dlpi_name;
    if (strncmp(base, "libfuse3", strlen("libfuse3")) != 0)
        return 0;
    *(char **)found = strdup(info->dlpi_name);
    return 1;
}

/* Returns the path of the libfuse3 in this process, to be freed; NULL when there is none.
 *
 * By what is loaded and not by a fixed name: Debian 12 has libfuse3.so.3, Debian 13 libfuse3.so.4, and a
 * wheel may carry a copy under a name of its own. */
char *libfuse_path(void)
{
    char *path = NULL;
    dl_iterate_phdr(is_libfuse, &path);
    return path;
}

/* A function pointer cannot be assigned from void * in ISO C; POSIX's own way round it. */
static int look_up(void *handle, const char *name, void *slot)
{
    *(void **)slot = dlsym(handle, name);
    return *(void **)slot != NULL;
}

/* Fills `libfuse`; returns 0 and says why on stderr when it cannot. */
int find_libfuse(void)
{
    if (libfuse.session_new)
        return 1;
    char *path = libfuse_path();
    void *handle = path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : NULL;
    free(path);
    if (!handle) {
        fprintf(stderr, "incfs: libfuse3 is not loaded in this process\n");
        return 0;
    }
    session_new_fn *session_new;
    int complete = look_up(handle, "fuse_session_new", &session_new) &
                   look_up(handle, "fuse_session_destroy", &libfuse.session_destroy) &
                   look_up(handle, "fuse_session_mount", &libfuse.session_mount) &
                   look_up(handle, "fuse_reply_err", &libfuse.reply_err) &
                   look_up(handle, "fuse_reply_lseek", &libfuse.reply_lseek) &
                   look_up(handle, "fuse_reply_write", &libfuse.reply_write) &
                   look_up(handle, "fuse_req_ctx", &libfuse.req_ctx) &
                   look_up(handle, "fuse_version", &libfuse.version) &
                   look_up(handle, "fuse_session_fd", &libfuse.hot.session_fd) &
                   look_up(handle, "fuse_session_receive_buf", &libfuse.hot.session_receive_buf);
    look_up(handle, "fuse_session_new_versioned", &libfuse.session_new_versioned);
    /* libfuse 3.17 has another function of this name, with more arguments. */
    if (complete && libfuse.version() < 317)
        look_up(handle, "fuse_session_custom_io", &libfuse.session_custom_io);
    if (!complete) {
        fprintf(stderr, "incfs: this libfuse3 lacks a function that incfs needs\n");
        return 0;
    }
    libfuse.session_new = session_new; /* last: its presence says that the table is whole */
    return 1;
}
