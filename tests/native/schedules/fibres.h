/* Fibres in place of threads: all run in one thread of the host, one at a time, and the one that runs changes only
 * where a schedule says so.
 *
 * A schedule is a priority for each fibre and a few changes of them at counted points, as in probabilistic
 * concurrency testing (Burckhardt et al., 2010): the ready fibre of the highest priority runs.  A fault that needs d
 * orderings is met with a probability that falls with the number of points to the power of d - 1 only.  Points are
 * counted in two grains: *coarse* ones are locks, atomics and calls of the system, *fine* ones each access to memory.
 *
 * Everything that happens follows from the schedule: the same one gives the same run.  Memory is sequentially
 * consistent here; what weaker orders do is for ThreadSanitizer (stress.c).
 */
#ifndef FIBRES_H
#define FIBRES_H

#include <stdbool.h>
#include <stdint.h>

enum { MOST_FIBRES = 8, MOST_CHANGES = 64, LAST = -1 };

struct change {
    uint64_t point;
    bool is_fine;
    int fibre; /* which goes before all others from then on; LAST: the one that runs goes behind all others */
};

struct schedule {
    uint64_t seed; /* of what else is random: short counts, misses, which waiter wakes first */
    int priorities[MOST_FIBRES];
    unsigned change_count;
    struct change changes[MOST_CHANGES]; /* of each grain, by rising point */
};

/* Before a run: adds a fibre. */
void fibres_add(const char *name, void (*run)(void *argument), void *argument);
/* Runs all fibres until they have ended, and forgets them.  Returns what was wrong, or NULL. */
const char *fibres_run(const struct schedule *schedule, bool is_traced);

/* Within a run.  Another fibre may go on here. */
void fibres_point(const char *what);
/* Goes on when the condition holds. */
void fibres_wait(bool (*holds)(void *context), void *context, const char *what);
/* Something that a fibre may wait for has changed. */
void fibres_notify(void);
/* The fibre that runs has nothing to do for a while, and goes on with another priority. */
void fibres_yield(const char *what);
/* Which fibre runs; -1 outside of a run. */
int fibres_current(void);
/* Ends the run. */
_Noreturn void fibres_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same numbers in each run of a schedule. */
uint32_t fibres_random(uint32_t below);
void fibres_trace(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool fibres_are_traced(void);
/* Of the last run. */
uint64_t fibres_points(void), fibres_fine_points(void), fibres_switches(void);

#endif
