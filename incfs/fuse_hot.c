/* The hot threads and their session.  See fuse_hot.h for the rules. */
#define _GNU_SOURCE
#include "fuse_hot_internal.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static struct fuse_session *session;
static struct hot_libfuse libfuse;
static struct worker workers[HOT_MAX_THREADS + 1]; /* the one behind the last stands by */
static unsigned worker_count;
static unsigned started_count;
static atomic_bool is_stopping;

/* ---- The threads -------------------------------------------------------------------------------- */

/* A thread that is at one request for so long waits for a host. */
enum { STUCK_MS = 20, IDLE_MS = 100 };

/* How long all threads will be free or busy at least, in ms; 0 while all of them wait for their hosts. */
static int time_to_look(void)
{
    uint64_t now = now_ns();
    unsigned busy = 0, stuck = 0;
    for (unsigned i = 0; i < worker_count; i++) {
        uint64_t since = atomic_load_explicit(&workers[i].busy_since_ns, memory_order_relaxed);
        busy += since != 0;
        stuck += since && now > since && now - since > STUCK_MS * 1000000ull;
    }
    return stuck == worker_count ? 0 : busy ? STUCK_MS : IDLE_MS;
}

/* Whether a request may be there for the thread that stands by: only while nobody else takes any. */
static bool is_needed(void)
{
    int pause_ms = time_to_look();
    if (pause_ms) {
        nanosleep(&(struct timespec){.tv_nsec = pause_ms * 1000000l}, NULL);
        return false;
    }
    struct pollfd device = {.fd = libfuse.session_fd(session), .events = POLLIN};
    return poll(&device, 1, STUCK_MS) > 0;
}

/* Takes one request; false when there will be no more. */
static bool take_request(struct worker *worker, struct item **item)
{
    int result = libfuse.session_receive_buf(session, &worker->buffer);
    if (result == -EINTR || result == -EAGAIN || result == -ENOMEM)
        return true;
    if (result <= 0) {
        end_queue(result);
        return false;
    }
    if (!serve(worker, item, result)) {
        put_away(*item, &worker->buffer, result);
        hand_over(*item);
        *item = NULL;
    }
    atomic_store_explicit(&worker->busy_since_ns, 0, memory_order_relaxed);
    return true;
}

static void *run(void *argument)
{
    struct worker *worker = argument;
    /* What handing over needs is there before a request is taken: out of memory none is lost. */
    struct item *item = malloc(sizeof *item);
    bool goes_on = true;
    while (goes_on && !atomic_load(&is_stopping)) {
        if (!item && !(item = malloc(sizeof *item)))
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        else if (!worker->stands_by || is_needed())
            goes_on = take_request(worker, &item);
    }
    free(item);
    return NULL;
}

static void wake(int number)
{
    (void)number; /* its arrival alone ends the read */
}

/* The signal that takes a thread out of its read of /dev/fuse. */
static int wake_signal(void)
{
    return SIGRTMIN + 7;
}

static void free_worker(struct worker *worker)
{
    free(worker->room);
    free(worker->buffer.mem);
    worker->room = NULL;
    memset(&worker->buffer, 0, sizeof worker->buffer);
}

static int start_worker(struct worker *worker)
{
    worker->room = aligned_alloc(4096, ROOM);
    if (!worker->room)
        return ENOMEM;
    int error = pthread_create(&worker->thread, NULL, run, worker);
    if (error)
        free_worker(worker);
    else
        pthread_setname_np(worker->thread, "incfs-hot");
    return error;
}

int hot_start(const struct hot_server *given, unsigned thread_count)
{
    if (!hot_is_open() || worker_count || !thread_count)
        return EINVAL;
    atomic_store(&is_stopping, false);
    struct sigaction action = {.sa_handler = wake};
    sigaction(wake_signal(), &action, NULL);
    /* Python's signals are for Python's main thread. */
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigdelset(&blocked, wake_signal());
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int error = 0;
    unsigned wanted = thread_count < HOT_MAX_THREADS ? thread_count : HOT_MAX_THREADS;
    worker_count = wanted;
    workers[wanted].stands_by = true;
    serve_from(given, libfuse.session_fd(session), wanted); /* before the threads look at it */
    while (started_count <= wanted && !(error = start_worker(&workers[started_count])))
        started_count++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        hot_stop();
    return error;
}

void hot_stop(void)
{
    atomic_store(&is_stopping, true);
    for (unsigned i = 0; i < started_count; i++) {
        /* The signal is lost on a thread that has looked at is_stopping and not begun its read yet. */
        while (pthread_tryjoin_np(workers[i].thread, NULL) == EBUSY) {
            pthread_kill(workers[i].thread, wake_signal());
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        }
        free_worker(&workers[i]);
        workers[i].stands_by = false;
    }
    worker_count = started_count = 0;
}

/* ---- The session -------------------------------------------------------------------------------- */

bool hot_open(struct fuse_session *opened, const struct hot_libfuse *functions)
{
    hot_close();
    libfuse = *functions;
    if (!queue_open())
        return false;
    session = opened;
    for (unsigned i = 0; i <= HOT_MAX_THREADS; i++)
        memset(&workers[i], 0, sizeof workers[i]);
    memset(sync_durations(), 0, sizeof(struct durations));
    return true;
}

bool hot_is_open(void)
{
    return session != NULL;
}

void hot_close(void)
{
    hot_stop();
    queue_close();
    session = NULL;
}

struct hot_counts hot_get_counts(void)
{
    struct hot_counts sum = {0};
    for (unsigned i = 0; i <= HOT_MAX_THREADS; i++) {
        sum.reads += atomic_load(&workers[i].reads);
        sum.read_bytes += atomic_load(&workers[i].read_bytes);
        sum.writes += atomic_load(&workers[i].writes);
        sum.write_bytes += atomic_load(&workers[i].write_bytes);
        sum.handed_reads += atomic_load(&workers[i].handed_reads);
        sum.handed_writes += atomic_load(&workers[i].handed_writes);
        sum.syncs += atomic_load(&workers[i].syncs);
        sum.lookups += atomic_load(&workers[i].lookups);
        sum.others += atomic_load(&workers[i].others);
    }
    return sum;
}

static void add_durations(struct hot_durations *sum, struct durations *more)
{
    for (unsigned operation = 0; operation < HOT_OPERATIONS; operation++) {
        sum->sum_ns[operation] += atomic_load(&more->sum_ns[operation]);
        for (unsigned bucket = 0; bucket < HOT_BUCKETS; bucket++)
            sum->counts[operation][bucket] += atomic_load(&more->counts[operation][bucket]);
    }
}

struct hot_durations hot_get_durations(void)
{
    struct hot_durations sum = {0};
    add_durations(&sum, sync_durations());
    for (unsigned i = 0; i <= HOT_MAX_THREADS; i++)
        add_durations(&sum, &workers[i].durations);
    return sum;
}
