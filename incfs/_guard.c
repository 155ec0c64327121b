/* incfs._guard: a mapped file that is cut off, or whose disk fails to read, does not end the process; a thread that has
 * no memory to begin does.
 *
 * The kernel answers an access to such a page with SIGBUS.  Within a guarded range another page takes its place, the
 * same for all, and the fault is counted: who reads looks at the count before believing anything.  Elsewhere the signal
 * means what it meant before.
 *
 * Concurrency: ranges are guarded and released under the interpreter's lock; the handler runs in any thread at any time
 * and takes no lock: what it calls are system calls and no more.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RANGES = 1024, HEAD_BYTES = 64 }; /* a pool has one, or one more for each copy of its metadata */

static struct {
    atomic_uintptr_t start;
    atomic_size_t length; /* 0: not in use */
    atomic_ulong faults;
    unsigned long guard_count; /* of this place: who guarded it before has nothing to do with it any more */
} ranges[RANGES];

static struct sigaction before;
static uintptr_t page_bytes;
static char head[HEAD_BYTES]; /* how the page begins that takes the place of others */

static int put_page(uintptr_t address)
{
    for (int i = 0; i < RANGES; i++) {
        size_t length = atomic_load(&ranges[i].length);
        if (address - atomic_load(&ranges[i].start) >= length)
            continue;
        /* Made elsewhere and moved there: other threads see it whole. */
        char *made = mmap(NULL, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (made == MAP_FAILED)
            return 0;
        memcpy(made, head, HEAD_BYTES);
        void *page = (void *)(address & ~(page_bytes - 1));
        if (mprotect(made, page_bytes, PROT_READ) ||
            mremap(made, page_bytes, page_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, page) == MAP_FAILED)
            return 0;
        atomic_fetch_add(&ranges[i].faults, 1);
        return 1;
    }
    return 0;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    if (put_page((uintptr_t)info->si_addr))
        return; /* the access is tried again */
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        before.sa_handler(number);
    else
        sigaction(number, &before, NULL); /* tried again, it ends the process as it would have */
}

static int install(void)
{
    struct sigaction now, action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, NULL, &now) || ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault))
        return 0;
    before = now;
    page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    return sigaction(SIGBUS, &action, NULL);
}

/* What was mapped there has gone without a word, as the mapping of a pool that nobody closed. */
static void forget_within(uintptr_t start, size_t length)
{
    for (int i = 0; i < RANGES; i++) {
        uintptr_t other = atomic_load(&ranges[i].start);
        if (other < start + length && start < other + atomic_load(&ranges[i].length))
            atomic_store(&ranges[i].length, 0);
    }
}

/* Returns the place of what guard has returned; -1 with an error, or without one if another has it now. */
static int place_of(PyObject *number)
{
    unsigned long given = PyLong_AsUnsignedLong(number);
    if (PyErr_Occurred())
        return -1;
    return ranges[given % RANGES].guard_count == given / RANGES ? (int)(given % RANGES) : -1;
}

static PyObject *guard(PyObject *module, PyObject *arguments)
{
    unsigned long long start, length;
    Py_buffer begin;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "KKy*", &start, &length, &begin))
        return NULL;
    memset(head, 0, HEAD_BYTES);
    memcpy(head, begin.buf, begin.len < HEAD_BYTES ? (size_t)begin.len : HEAD_BYTES);
    PyBuffer_Release(&begin);
    if (install())
        return PyErr_SetFromErrno(PyExc_OSError);
    forget_within((uintptr_t)start, (size_t)length);
    for (unsigned long i = 0; i < RANGES; i++)
        if (!atomic_load(&ranges[i].length)) {
            atomic_store(&ranges[i].faults, 0);
            atomic_store(&ranges[i].start, (uintptr_t)start);
            atomic_store(&ranges[i].length, (size_t)length);
            return PyLong_FromUnsignedLong(++ranges[i].guard_count * RANGES + i);
        }
    PyErr_SetString(PyExc_OverflowError, "too many guarded ranges");
    return NULL;
}

static PyObject *release(PyObject *module, PyObject *number)
{
    int i = place_of(number);
    (void)module;
    if (i < 0 && PyErr_Occurred())
        return NULL;
    if (i >= 0)
        atomic_store(&ranges[i].length, 0);
    Py_RETURN_NONE;
}

static PyObject *faults(PyObject *module, PyObject *number)
{
    int i = place_of(number);
    (void)module;
    if (i < 0 && PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLong(i < 0 ? 0 : atomic_load(&ranges[i].faults));
}

/* sys.unraisablehook of a daemon.  Python tells of a thread whose first function found no memory in this way alone, in
 * that thread, and whoever started it waits for ever (threading.Thread.start).  What could not be begun is not known,
 * so the process ends, as if the kernel had killed it for its memory.  No Python code: that needs memory, too. */
static PyObject *end_without_thread(PyObject *module, PyObject *told)
{
    static const char start[] = "Exception ignored in thread started by";
    (void)module;
    PyObject *type = PyStructSequence_GetItem(told, 0), *message = PyStructSequence_GetItem(told, 3);
    const char *text = type == PyExc_MemoryError && PyUnicode_Check(message) ? PyUnicode_AsUTF8(message) : NULL;
    if (text && !strncmp(text, start, sizeof start - 1)) {
        static const char line[] = "incfs: no memory to begin a thread: the process ends\n";
        ssize_t told_bytes = write(STDERR_FILENO, line, sizeof line - 1);
        (void)told_bytes; /* nobody may listen */
        kill(getpid(), SIGKILL);
    }
    PyErr_Clear();
    PyObject *otherwise = PySys_GetObject("__unraisablehook__");
    return PyObject_CallOneArg(otherwise, told);
}

static PyMethodDef methods[] = {
    {"guard", guard, METH_VARARGS, "guard(start, length, head) -> number: guard a range of addresses; head: what pages there begin with then."},
    {"release", release, METH_O, "release(number): guard it no more."},
    {"faults", faults, METH_O, "faults(number) -> how many of its pages could not be read."},
    {"end_without_thread", end_without_thread, METH_O, "The sys.unraisablehook that ends the process when a thread has no memory to begin."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_guard", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__guard(void)
{
    return PyModule_Create(&definition);
}
