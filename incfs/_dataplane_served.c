/* Methods of the native data plane: what hot threads may serve, and the journal that is lent to them. */
#include "_dataplane.h"

/* ---- Served requests ---------------------------------------------------------------------------- */

PyObject *method_serve(DataPlane *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map_id", "size_bytes", "facts", "is_writable", "keep_zeros", "verify", NULL};
    unsigned long long map_id, size_bytes, mapped_blocks, accessed_ns, modified_ns, changed_ns;
    struct plane_facts facts;
    int is_writable = 0, keep_zeros = 0, verify = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KK(IIIIKKKK)|$ppp", names, &map_id, &size_bytes, &facts.mode,
                                     &facts.uid, &facts.gid, &facts.link_count, &mapped_blocks, &accessed_ns,
                                     &modified_ns, &changed_ns, &is_writable, &keep_zeros, &verify))
        return NULL;
    facts.mapped_blocks = mapped_blocks;
    facts.accessed_ns = accessed_ns;
    facts.modified_ns = modified_ns;
    facts.changed_ns = changed_ns;
    struct plane_rules rules = {.keeps_zeros = keep_zeros, .is_unverified = !verify};
    if (plane_serve(self->plane, map_id, size_bytes, is_writable, rules, &facts) != PLANE_OK)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject *method_unserve(DataPlane *self, PyObject *arg)
{
    unsigned long long map_id = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    plane_unserve(self->plane, map_id);
    Py_RETURN_NONE;
}

PyObject *method_freeze(DataPlane *self, PyObject *unused)
{
    (void)unused;
    lane_close(self->lane);
    plane_freeze(self->plane);
    Py_RETURN_NONE;
}

PyObject *method_watch(DataPlane *self, PyObject *arg)
{
    size_t seal_at = PyLong_AsSize_t(arg);
    if (PyErr_Occurred())
        return NULL;
    int fd = plane_watch(self->plane, seal_at);
    return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}

PyObject *method_attend(DataPlane *self, PyObject *unused)
{
    (void)unused;
    uint64_t *tables;
    size_t table_count;
    if (plane_attend(self->plane, &tables, &table_count) != PLANE_OK)
        return PyErr_NoMemory();
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < table_count; i++)
        append_new(list, PyLong_FromUnsignedLongLong(tables[i]));
    free(tables);
    if (PyErr_Occurred())
        Py_CLEAR(list);
    uint64_t address;
    int failure = plane_failure(self->plane, &address);
    if (!list || !failure)
        return list;
    Py_DECREF(list);
    struct plane_refusal why = {.address = address, .host_errno = failure};
    return raise_status(self, PLANE_WRITE_ERROR, 0, &why);
}

PyObject *method_written(DataPlane *self, PyObject *unused)
{
    (void)unused;
    uint64_t *writes;
    size_t write_count;
    /* What is taken here only a commit of the control plane makes durable. */
    lane_close(self->lane);
    if (plane_written(self->plane, &writes, &write_count) != PLANE_OK)
        return PyErr_NoMemory();
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < write_count; i++)
        append_new(list, Py_BuildValue("(KK)", (unsigned long long)writes[2 * i], (unsigned long long)writes[2 * i + 1]));
    free(writes);
    if (PyErr_Occurred())
        Py_CLEAR(list);
    return list;
}

/* ---- What hot threads call ---------------------------------------------------------------------- */

static bool server_read(void *owner, uint64_t inode, uint64_t offset_bytes, size_t length_bytes, bool can_wait,
                        char *buffer, size_t room, size_t *start, size_t *count)
{
    DataPlane *self = owner;
    return plane_serve_read(self->plane, inode, offset_bytes, length_bytes, can_wait, buffer, room, start, count) ==
           PLANE_OK;
}

static bool server_write(void *owner, uint64_t inode, uint64_t offset_bytes, const void *data, size_t length_bytes)
{
    DataPlane *self = owner;
    return plane_serve_write(self->plane, inode, offset_bytes, data, length_bytes) == PLANE_OK;
}

static bool server_stat(void *owner, uint64_t inode, struct hot_stat *stat)
{
    DataPlane *self = owner;
    struct plane_facts facts;
    if (!plane_serve_stat(self->plane, inode, &facts, &stat->size_bytes))
        return false;
    *stat = (struct hot_stat){
        .mode = facts.mode,
        .uid = facts.uid,
        .gid = facts.gid,
        .link_count = facts.link_count,
        .block_bytes = self->block_bytes,
        .size_bytes = stat->size_bytes,
        .stored_bytes = facts.mapped_blocks * self->block_bytes,
        .accessed_ns = facts.accessed_ns,
        .modified_ns = facts.modified_ns,
        .changed_ns = facts.changed_ns,
    };
    return true;
}

static bool server_set_modified(void *owner, uint64_t inode, uint64_t modified_ns)
{
    DataPlane *self = owner;
    return plane_serve_time(self->plane, inode, modified_ns);
}

static bool server_sync(void *owner, struct hot_waiter *waiter, bool can_wait, const struct hot_answers *answers)
{
    DataPlane *self = owner;
    struct plane_facts facts;
    uint64_t size_bytes;
    return plane_serve_stat(self->plane, waiter->inode, &facts, &size_bytes) &&
           lane_sync(self->lane, waiter, can_wait, answers);
}

static void release_capsule(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, HOT_SERVER_CAPSULE));
    Py_XDECREF((PyObject *)PyCapsule_GetContext(capsule));
}

/* The capsule keeps the plane alive. */
PyObject *method_server(DataPlane *self, PyObject *unused)
{
    (void)unused;
    struct hot_server *server = malloc(sizeof *server);
    if (!server)
        return PyErr_NoMemory();
    *server = (struct hot_server){self, server_read, server_write, server_stat, server_set_modified, server_sync};
    PyObject *capsule = PyCapsule_New(server, HOT_SERVER_CAPSULE, release_capsule);
    if (!capsule)
        free(server);
    else
        PyCapsule_SetContext(capsule, Py_NewRef((PyObject *)self));
    return capsule;
}

/* ---- The journal's end -------------------------------------------------------------------------- */

PyObject *method_lend(DataPlane *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fds", "end_bytes", "limit_bytes", "nonce", "sequence", "folded", "most_blocks", NULL};
    PyObject *fds;
    unsigned long long end_bytes, limit_bytes, nonce, sequence, folded;
    Py_ssize_t most_blocks;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O!KKKKKn", names, &PyList_Type, &fds, &end_bytes, &limit_bytes,
                                     &nonce, &sequence, &folded, &most_blocks))
        return NULL;
    struct lane_journal journal = {.copies = PyList_GET_SIZE(fds), .end_bytes = end_bytes, .limit_bytes = limit_bytes,
                                   .nonce = nonce, .sequence = sequence, .folded = folded, .most_blocks = most_blocks,
                                   .block_bytes = self->block_bytes};
    if (journal.copies < 1 || journal.copies > LANE_MOST_COPIES) {
        PyErr_SetString(PyExc_ValueError, "the journal has 1 to 4 copies");
        return NULL;
    }
    for (size_t i = 0; i < journal.copies; i++)
        journal.fds[i] = PyLong_AsLong(PyList_GET_ITEM(fds, i));
    if (PyErr_Occurred())
        return NULL;
    lane_lend(self->lane, &journal);
    Py_RETURN_NONE;
}

PyObject *method_left(DataPlane *self, PyObject *unused)
{
    (void)unused;
    PyObject *found = PyList_New(0);
    for (size_t i = 0; found && i < LANE_MOST_COPIES; i++) {
        int error = lane_left(self->lane, i);
        PyObject *entry = error ? Py_BuildValue("(ni)", (Py_ssize_t)i, error) : NULL;
        if (error && (!entry || PyList_Append(found, entry)))
            Py_CLEAR(found);
        Py_XDECREF(entry);
    }
    return found;
}

PyObject *method_reopen(DataPlane *self, PyObject *unused)
{
    (void)unused;
    lane_reopen(self->lane);
    Py_RETURN_NONE;
}

/* Raises what keeps the lane's last record from being durable, if anything does. */
static bool raise_unsettled(DataPlane *self, int error)
{
    int no_room = error ? 0 : lane_no_room(self->lane);
    if (error || no_room)
        raise_made(self, "_host_error", Py_BuildValue("(sKi)", error ? "write" : "append to", 0ull, error + no_room));
    return error || no_room;
}

PyObject *method_stop(DataPlane *self, PyObject *unused)
{
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    lane_stop(self->lane);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *method_reclaim(DataPlane *self, PyObject *unused)
{
    (void)unused;
    uint64_t end_bytes;
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = lane_reclaim(self->lane, &end_bytes);
    Py_END_ALLOW_THREADS
    return raise_unsettled(self, error) ? NULL : PyLong_FromUnsignedLongLong(end_bytes);
}

PyObject *method_settle(DataPlane *self, PyObject *unused)
{
    (void)unused;
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = lane_settle(self->lane);
    Py_END_ALLOW_THREADS
    if (raise_unsettled(self, error))
        return NULL;
    Py_RETURN_NONE;
}

PyObject *get_durable_sequence(DataPlane *self, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLongLong(lane_durable_sequence(self->lane));
}

PyObject *method_close_journal(DataPlane *self, PyObject *unused)
{
    (void)unused;
    lane_close(self->lane);
    Py_RETURN_NONE;
}

struct asked {
    struct hot_waiter waiter; /* first */
    bool is_refused;
    int error;
};

static void asked_done(struct hot_waiter *waiter, int error)
{
    ((struct asked *)waiter)->error = error;
}

static void asked_refused(struct hot_waiter *waiter)
{
    ((struct asked *)waiter)->is_refused = true;
}

/* With nobody else about, the answer is there when lane_sync returns. */
PyObject *method_sync(DataPlane *self, PyObject *arg)
{
    static const struct hot_answers answers = {asked_done, asked_refused};
    struct asked asked = {.waiter.inode = PyLong_AsUnsignedLongLong(arg)};
    if (PyErr_Occurred())
        return NULL;
    bool is_taken;
    Py_BEGIN_ALLOW_THREADS
    is_taken = server_sync(self, &asked.waiter, true, &answers);
    Py_END_ALLOW_THREADS
    if (asked.error)
        return raise_made(self, "_host_error", Py_BuildValue("(sKi)", "write", 0ull, asked.error));
    return PyBool_FromLong(is_taken && !asked.is_refused);
}

/* The functions are those of struct lane_disk. */
PyObject *method_divert(DataPlane *self, PyObject *args)
{
    unsigned long long write, flush;
    if (!PyArg_ParseTuple(args, "KK", &write, &flush))
        return NULL;
    lane_divert(self->lane, &(struct lane_disk){(int (*)(int, const void *, size_t, uint64_t))(uintptr_t)write,
                                                (int (*)(int))(uintptr_t)flush});
    Py_RETURN_NONE;
}

PyObject *method_set_folded(DataPlane *self, PyObject *arg)
{
    unsigned long long folded = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    lane_set_folded(self->lane, folded);
    Py_RETURN_NONE;
}

PyObject *get_lent_end_bytes(DataPlane *self, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLongLong(lane_end_bytes(self->lane));
}
