/* What the product's code calls instead of the system, so that its sources need no change: hooks_NAME stands for NAME
 * in its compiled files (objcopy --redefine-sym, test_schedules.py), and code compiled with -fsanitize=thread calls a
 * function at each access to memory, which ThreadSanitizer's runtime would define; here these are points of the
 * schedule.
 */
#define _GNU_SOURCE
#include "hooks.h"

#include "fibres.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- Accesses to memory ---------------------------------------------------------------------- */

extern uint64_t fibres_fine_left;
void fibres_fine_change(void);

static inline void fine_point(void)
{
    if (!--fibres_fine_left)
        fibres_fine_change();
}

#define ACCESS(name)                                                                                                   \
    void __tsan_##name(void *at);                                                                                      \
    void __tsan_##name(void *at)                                                                                       \
    {                                                                                                                  \
        (void)at;                                                                                                      \
        fine_point();                                                                                                  \
    }
#define ACCESSES(kind) ACCESS(kind##1) ACCESS(kind##2) ACCESS(kind##4) ACCESS(kind##8) ACCESS(kind##16)
ACCESSES(read)
ACCESSES(write)
ACCESSES(unaligned_read)
ACCESSES(unaligned_write)
ACCESSES(volatile_read)
ACCESSES(volatile_write)

#define RANGE(name)                                                                                                    \
    void __tsan_##name(void *at, size_t length);                                                                       \
    void __tsan_##name(void *at, size_t length)                                                                        \
    {                                                                                                                  \
        (void)at, (void)length;                                                                                        \
        fine_point();                                                                                                  \
    }
RANGE(read_range)
RANGE(write_range)

void __tsan_init(void);
void __tsan_func_entry(void *caller);
void __tsan_func_exit(void);
void __tsan_init(void) {}
void __tsan_func_entry(void *caller)
{
    (void)caller;
}
void __tsan_func_exit(void) {}

/* ---- Atomics --------------------------------------------------------------------------------- */

#define CHANGING(type, bits, name, operation)                                                                          \
    type __tsan_atomic##bits##_##name(volatile type *at, type value, int order);                                       \
    type __tsan_atomic##bits##_##name(volatile type *at, type value, int order)                                        \
    {                                                                                                                  \
        (void)order;                                                                                                   \
        fibres_point("atomic " #name);                                                                                 \
        type before = *at;                                                                                             \
        *at = operation;                                                                                               \
        return before;                                                                                                 \
    }

#define ATOMIC(type, bits)                                                                                             \
    CHANGING(type, bits, exchange, value)                                                                              \
    CHANGING(type, bits, fetch_add, before + value)                                                                    \
    CHANGING(type, bits, fetch_sub, before - value)                                                                    \
    CHANGING(type, bits, fetch_and, before &value)                                                                     \
    CHANGING(type, bits, fetch_or, before | value)                                                                     \
    CHANGING(type, bits, fetch_xor, before ^ value)                                                                    \
    type __tsan_atomic##bits##_load(const volatile type *at, int order);                                               \
    type __tsan_atomic##bits##_load(const volatile type *at, int order)                                                \
    {                                                                                                                  \
        (void)order;                                                                                                   \
        fibres_point("atomic load");                                                                                   \
        return *at;                                                                                                    \
    }                                                                                                                  \
    void __tsan_atomic##bits##_store(volatile type *at, type value, int order);                                        \
    void __tsan_atomic##bits##_store(volatile type *at, type value, int order)                                         \
    {                                                                                                                  \
        (void)order;                                                                                                   \
        fibres_point("atomic store");                                                                                  \
        *at = value;                                                                                                   \
    }                                                                                                                  \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile type *at, type *expected, type value, int order,        \
                                                      int failed_order);                                               \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile type *at, type *expected, type value, int order,        \
                                                      int failed_order)                                                \
    {                                                                                                                  \
        (void)order, (void)failed_order;                                                                               \
        fibres_point("atomic compare");                                                                                \
        type found = *at;                                                                                              \
        if (found == *expected)                                                                                        \
            *at = value;                                                                                               \
        else                                                                                                           \
            *expected = found;                                                                                         \
        return found == *expected && *at == value;                                                                     \
    }                                                                                                                  \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile type *at, type *expected, type value, int order,          \
                                                    int failed_order);                                                 \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile type *at, type *expected, type value, int order,          \
                                                    int failed_order)                                                  \
    {                                                                                                                  \
        return __tsan_atomic##bits##_compare_exchange_strong(at, expected, value, order, failed_order);                \
    }
ATOMIC(uint8_t, 8)
ATOMIC(uint16_t, 16)
ATOMIC(uint32_t, 32)
ATOMIC(uint64_t, 64)

void __tsan_atomic_thread_fence(int order);
void __tsan_atomic_thread_fence(int order)
{
    (void)order;
    fibres_point("fence");
}

/* ---- Mutexes --------------------------------------------------------------------------------- */

/* In the room of a pthread_mutex_t; all zeros is a free one. */
struct mutex {
    int owner; /* fibre + OWNERS */
    bool is_destroyed;
};
enum { OWNERS = 2, OUTSIDE = 1 };

static int me(void)
{
    return fibres_current() < 0 ? OUTSIDE : fibres_current() + OWNERS;
}

static bool is_free(void *context)
{
    return !((struct mutex *)context)->owner;
}

int hooks_pthread_mutex_init(struct mutex *mutex, const void *attributes)
{
    (void)attributes;
    *mutex = (struct mutex){0};
    return 0;
}

int hooks_pthread_mutex_destroy(struct mutex *mutex)
{
    if (mutex->owner || mutex->is_destroyed)
        fibres_fail("a mutex is destroyed that is %s", mutex->owner ? "held" : "no more");
    mutex->is_destroyed = true;
    return 0;
}

static void take(struct mutex *mutex)
{
    if (mutex->is_destroyed || mutex->owner == me())
        fibres_fail("a mutex is locked that is %s", mutex->is_destroyed ? "no more" : "held by the same thread");
    fibres_wait(is_free, mutex, "a mutex");
    mutex->owner = me();
}

int hooks_pthread_mutex_lock(struct mutex *mutex)
{
    fibres_point("lock");
    take(mutex);
    return 0;
}

int hooks_pthread_mutex_trylock(struct mutex *mutex)
{
    fibres_point("try lock");
    if (mutex->owner)
        return EBUSY;
    mutex->owner = me();
    return 0;
}

static void let_go(struct mutex *mutex)
{
    if (mutex->owner != me())
        fibres_fail("a mutex is unlocked by who does not hold it");
    mutex->owner = 0;
    fibres_notify();
}

int hooks_pthread_mutex_unlock(struct mutex *mutex)
{
    let_go(mutex);
    fibres_point("unlock");
    return 0;
}

/* ---- Reader-writer locks --------------------------------------------------------------------- */

/* In the room of a pthread_rwlock_t. */
struct gate {
    int writer, readers, waiting_writers;
    bool prefers_writers;
};

int hooks_pthread_rwlock_init(struct gate *gate, const pthread_rwlockattr_t *attributes)
{
    int kind = PTHREAD_RWLOCK_DEFAULT_NP;
    if (attributes)
        pthread_rwlockattr_getkind_np(attributes, &kind);
    *gate = (struct gate){.prefers_writers = kind == PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP};
    return 0;
}

int hooks_pthread_rwlock_destroy(struct gate *gate)
{
    if (gate->writer || gate->readers)
        fibres_fail("a gate is destroyed that is held");
    return 0;
}

static bool readers_may_pass(void *context)
{
    struct gate *gate = context;
    return !gate->writer && !(gate->prefers_writers && gate->waiting_writers);
}

static bool writer_may_pass(void *context)
{
    struct gate *gate = context;
    return !gate->writer && !gate->readers;
}

int hooks_pthread_rwlock_rdlock(struct gate *gate)
{
    fibres_point("read lock");
    fibres_wait(readers_may_pass, gate, "the gate, to read");
    gate->readers++;
    return 0;
}

int hooks_pthread_rwlock_wrlock(struct gate *gate)
{
    fibres_point("write lock");
    gate->waiting_writers++;
    fibres_wait(writer_may_pass, gate, "the gate, alone");
    gate->waiting_writers--;
    gate->writer = me();
    return 0;
}

int hooks_pthread_rwlock_unlock(struct gate *gate)
{
    if (gate->writer ? gate->writer != me() : !gate->readers)
        fibres_fail("a gate is unlocked by who does not hold it");
    if (gate->writer)
        gate->writer = 0;
    else
        gate->readers--;
    fibres_notify();
    fibres_point("unlock");
    return 0;
}

/* ---- Conditions ------------------------------------------------------------------------------ */

struct waiting {
    const void *condition; /* NULL: was woken */
};

static struct waiting waiting[MOST_FIBRES];

static bool is_woken(void *context)
{
    return !((struct waiting *)context)->condition;
}

int hooks_pthread_cond_init(void *condition, const void *attributes)
{
    (void)condition, (void)attributes;
    return 0;
}

int hooks_pthread_cond_destroy(void *condition)
{
    for (int i = 0; i < MOST_FIBRES; i++)
        if (waiting[i].condition == condition)
            fibres_fail("a condition is destroyed that somebody waits for");
    return 0;
}

/* Now and then a thread wakes up although nobody woke it, as it may. */
int hooks_pthread_cond_wait(void *condition, struct mutex *mutex)
{
    fibres_point("wait");
    if (fibres_current() < 0)
        fibres_fail("outside of a run nobody will ever wake this thread");
    struct waiting *mine = &waiting[fibres_current()];
    let_go(mutex);
    if (fibres_random(8)) {
        mine->condition = condition;
        fibres_wait(is_woken, mine, "a condition");
    }
    take(mutex);
    return 0;
}

/* Time passes as the schedule likes: it may be over at once. */
int hooks_pthread_cond_timedwait(void *condition, struct mutex *mutex, const struct timespec *end)
{
    (void)end;
    struct waiting *mine = &waiting[fibres_current()];
    let_go(mutex);
    mine->condition = condition;
    fibres_yield("wait, not for ever");
    bool is_late = mine->condition;
    mine->condition = NULL;
    take(mutex);
    return is_late ? ETIMEDOUT : 0;
}

int hooks_pthread_cond_clockwait(void *condition, struct mutex *mutex, int clock, const struct timespec *end)
{
    (void)clock;
    return hooks_pthread_cond_timedwait(condition, mutex, end);
}

static void wake(const void *condition, unsigned most)
{
    unsigned start = fibres_random(MOST_FIBRES);
    for (unsigned i = 0; i < MOST_FIBRES && most; i++) {
        struct waiting *other = &waiting[(start + i) % MOST_FIBRES];
        if (other->condition == condition)
            other->condition = NULL, most--;
    }
    fibres_notify();
    fibres_point("wake");
}

int hooks_pthread_cond_signal(void *condition)
{
    wake(condition, 1);
    return 0;
}

int hooks_pthread_cond_broadcast(void *condition)
{
    wake(condition, MOST_FIBRES);
    return 0;
}

/* ---- Threads --------------------------------------------------------------------------------- */

/* lane.c begins one for each further copy of the journal; the control plane here lends one copy. */
_Noreturn int hooks_pthread_create(void *thread, const void *attributes, void *(*run)(void *), void *argument)
{
    (void)thread, (void)attributes, (void)run, (void)argument;
    fibres_fail("a thread is begun beside the fibres");
}

_Noreturn int hooks_pthread_join(pthread_t thread, void **result)
{
    (void)thread, (void)result;
    fibres_fail("a thread is waited for that no fibre stands for");
}

/* ---- Memory ---------------------------------------------------------------------------------- */

/* Taken from one arena, and never given twice within a run: what is used after it was freed is poison. */
enum { ARENA_BYTES = 48 << 20, ALIGNMENT = 16, MOST_POISONED = 16384, POISON = 0xDB };

struct header {
    size_t length;
    bool is_free;
};

static char arena[ARENA_BYTES] __attribute__((aligned(4096)));
static size_t arena_used;
static long live_count;
static uint64_t ticks; /* of the clock, in nanoseconds */

static size_t header_room(void)
{
    return (sizeof(struct header) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static struct header *header_of(void *memory)
{
    return (struct header *)((char *)memory - header_room());
}

void hooks_begin(void)
{
    arena_used = 0;
    live_count = 0;
    ticks = 1000000000;
    memset(waiting, 0, sizeof waiting);
}

long hooks_live_count(void)
{
    return live_count;
}

static void *allot(size_t length, size_t alignment)
{
    size_t start = (arena_used + header_room() + alignment - 1) / alignment * alignment;
    if (start + length > ARENA_BYTES)
        fibres_fail("the arena is too small");
    arena_used = start + length;
    live_count++;
    *header_of(arena + start) = (struct header){.length = length};
    return arena + start;
}

void *hooks_malloc(size_t length)
{
    char *memory = allot(length, ALIGNMENT);
    memset(memory, POISON, length < MOST_POISONED ? length : 0);
    return memory;
}

void *hooks_calloc(size_t count, size_t length)
{
    return memset(allot(count * length, ALIGNMENT), 0, count * length);
}

void *hooks_aligned_alloc(size_t alignment, size_t length)
{
    return allot(length, alignment);
}

void hooks_free(void *memory)
{
    if (!memory)
        return;
    struct header *header = header_of(memory);
    if (header->is_free)
        fibres_fail("memory is freed twice");
    header->is_free = true;
    memset(memory, POISON, header->length < MOST_POISONED ? header->length : 0);
    live_count--;
}

void *hooks_realloc(void *memory, size_t length)
{
    void *larger = hooks_malloc(length);
    if (memory)
        memcpy(larger, memory, header_of(memory)->length < length ? header_of(memory)->length : length);
    hooks_free(memory);
    return larger;
}

/* A copy is no single instant. */
void *hooks_memcpy(void *target, const void *source, size_t length)
{
    size_t half = length / 2;
    fine_point();
    __builtin_memmove(target, source, half);
    fine_point();
    __builtin_memmove((char *)target + half, (const char *)source + half, length - half);
    return target;
}

/* ---- The clock ------------------------------------------------------------------------------- */

int hooks_clock_gettime(int clock, struct timespec *now)
{
    (void)clock;
    ticks++;
    *now = (struct timespec){ticks / 1000000000, ticks % 1000000000};
    return 0;
}
