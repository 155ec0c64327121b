/* The scheduler.  See fibres.h. */
#define _GNU_SOURCE
#include "fibres.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

enum { STACK_BYTES = 512 << 10, GUARD_BYTES = 4096 };
/* More than any run needs: somebody turns in circles. */
static const uint64_t MOST_POINTS = 200000, MOST_FINE_POINTS = 20000000;

struct fibre {
    const char *name, *waits_for;
    void (*run)(void *argument);
    void *argument;
    bool (*holds)(void *context); /* NULL: it waits for nothing */
    void *context;
    bool has_begun, has_ended;
    int priority;
    char *stack;
    jmp_buf jump;
};

static struct fibre fibres[MOST_FIBRES];
static int fibre_count, current = -1, highest, lowest;
static const struct schedule *schedule;
static unsigned next_change[2]; /* by grain */
static uint64_t points, fine_points, switches, random_state;
static bool must_choose, is_traced;
static sigjmp_buf outside;
static char failure[512];

uint64_t fibres_fine_left; /* until the next fine change; hooks.c counts it down */
static uint64_t fine_step;

/* ---- Choosing -------------------------------------------------------------------------------- */

static bool is_ready(struct fibre *fibre)
{
    return !fibre->has_ended && (!fibre->holds || fibre->holds(fibre->context));
}

static int choose(void)
{
    int chosen = -1;
    for (int i = 0; i < fibre_count; i++)
        if ((chosen < 0 || fibres[i].priority > fibres[chosen].priority) && is_ready(&fibres[i]))
            chosen = i;
    return chosen;
}

static _Noreturn void leave(void)
{
    siglongjmp(outside, 1);
}

static _Noreturn void tell_deadlock(void)
{
    char text[400] = "";
    for (int i = 0; i < fibre_count; i++)
        if (!fibres[i].has_ended)
            snprintf(text + strlen(text), sizeof text - strlen(text), "; %s waits for %s", fibres[i].name,
                     fibres[i].waits_for);
    fibres_fail("deadlock%s", text);
}

static _Noreturn void enter(int next);

static void begin_fibre(void)
{
    struct fibre *fibre = &fibres[current];
    fibre->run(fibre->argument);
    fibre->has_ended = true;
    bool all_ended = true;
    for (int i = 0; i < fibre_count; i++)
        all_ended &= fibres[i].has_ended;
    if (all_ended)
        leave();
    int next = choose();
    if (next < 0)
        tell_deadlock();
    enter(next);
}

/* Leaves the running fibre without keeping where it is. */
static void enter(int next)
{
    struct fibre *fibre = &fibres[next];
    current = next;
    switches++;
    fibre->holds = NULL;
    if (fibre->has_begun)
        _longjmp(fibre->jump, 1);
    fibre->has_begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fibre->stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = NULL;
    makecontext(&context, begin_fibre, 0);
    setcontext(&context);
    abort();
}

static void run_chosen(void)
{
    must_choose = false;
    int next = choose();
    if (next < 0)
        tell_deadlock();
    if (next == current) {
        fibres[current].holds = NULL;
        return;
    }
    if (is_traced)
        printf("%8s         -> %s\n", "", fibres[next].name);
    int error = errno; /* each thread has its own */
    if (!_setjmp(fibres[current].jump))
        enter(next);
    errno = error;
}

/* ---- Points ---------------------------------------------------------------------------------- */

static const struct change *change_at(bool is_fine)
{
    unsigned *next = &next_change[is_fine];
    while (*next < schedule->change_count && schedule->changes[*next].is_fine != is_fine)
        ++*next;
    return *next < schedule->change_count ? &schedule->changes[*next] : NULL;
}

static void apply(const struct change *change)
{
    int fibre = change->fibre == LAST ? current : change->fibre;
    if (fibre < fibre_count)
        fibres[fibre].priority = change->fibre == LAST ? --lowest : ++highest;
    must_choose = true;
}

/* Lets the countdown of fine points end at the next change of that grain. */
static void set_fine_step(void)
{
    const struct change *change = change_at(true);
    uint64_t next = change && change->point > fine_points ? change->point : MOST_FINE_POINTS;
    if (fine_points >= MOST_FINE_POINTS)
        fibres_fail("no end after %lu accesses to memory", (unsigned long)fine_points);
    fine_step = fibres_fine_left = next - fine_points;
}

void fibres_fine_change(void)
{
    if (current < 0) {
        fibres_fine_left = MOST_FINE_POINTS;
        return;
    }
    fine_points += fine_step;
    for (const struct change *change; (change = change_at(true)) && change->point <= fine_points; next_change[1]++)
        apply(change);
    set_fine_step();
    if (must_choose)
        run_chosen();
}

void fibres_point(const char *what)
{
    if (current < 0)
        return;
    if (is_traced)
        printf("%8lu %8s  %s\n", (unsigned long)points, fibres[current].name, what);
    if (++points >= MOST_POINTS)
        fibres_fail("no end after %lu points", (unsigned long)points);
    for (const struct change *change; (change = change_at(false)) && change->point <= points; next_change[0]++)
        apply(change);
    if (must_choose)
        run_chosen();
}

void fibres_wait(bool (*holds)(void *context), void *context, const char *what)
{
    if (holds(context))
        return;
    if (current < 0)
        fibres_fail("outside of a run nobody will ever let go of %s", what);
    fibres[current].holds = holds;
    fibres[current].context = context;
    fibres[current].waits_for = what;
    if (is_traced)
        printf("%8lu %8s  waits for %s\n", (unsigned long)points, fibres[current].name, what);
    run_chosen();
}

void fibres_notify(void)
{
    must_choose = true;
}

void fibres_yield(const char *what)
{
    if (current >= 0)
        fibres[current].priority = lowest + (int)fibres_random(highest - lowest + 1);
    must_choose = true;
    fibres_point(what);
}

int fibres_current(void)
{
    return current;
}

/* ---- Runs ------------------------------------------------------------------------------------ */

void fibres_fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = current >= 0 ? snprintf(failure, sizeof failure, "%s: ", fibres[current].name) : 0;
    vsnprintf(failure + length, sizeof failure - length, format, arguments);
    va_end(arguments);
    leave();
}

static void on_fault(int number)
{
    snprintf(failure, sizeof failure, "%s: signal %d (%s)", current >= 0 ? fibres[current].name : "outside", number,
             strsignal(number));
    siglongjmp(outside, 1);
}

/* A run that uses memory after it was freed may fault: that is a finding like any other. */
static void catch_faults(void)
{
    static bool is_done;
    if (is_done)
        return;
    is_done = true;
    static char room[64 << 10];
    sigaltstack(&(stack_t){.ss_sp = room, .ss_size = sizeof room}, NULL);
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_ONSTACK | SA_NODEFER};
    for (const int *number = (const int[]){SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, 0}; *number; number++)
        sigaction(*number, &action, NULL);
}

void fibres_add(const char *name, void (*run)(void *argument), void *argument)
{
    struct fibre *fibre = &fibres[fibre_count++];
    char *stack = fibre->stack;
    if (!stack) {
        stack = mmap(NULL, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED || mprotect(stack, GUARD_BYTES, PROT_NONE))
            abort();
        stack += GUARD_BYTES;
    }
    *fibre = (struct fibre){.name = name, .run = run, .argument = argument, .stack = stack};
}

const char *fibres_run(const struct schedule *given, bool traced)
{
    catch_faults();
    schedule = given;
    is_traced = traced;
    points = fine_points = switches = 0;
    highest = lowest = 0;
    random_state = given->seed;
    next_change[0] = next_change[1] = 0;
    must_choose = false;
    failure[0] = '\0';
    for (int i = 0; i < fibre_count; i++) {
        fibres[i].priority = given->priorities[i];
        highest = highest > given->priorities[i] ? highest : given->priorities[i];
        lowest = lowest < given->priorities[i] ? lowest : given->priorities[i];
    }
    if (!sigsetjmp(outside, 1)) {
        set_fine_step();
        enter(choose());
    }
    fine_points += fine_step - fibres_fine_left;
    fibres_fine_left = UINT64_MAX;
    current = -1;
    fibre_count = 0;
    return failure[0] ? failure : NULL;
}

uint32_t fibres_random(uint32_t below)
{
    uint64_t mixed = random_state += 0x9E3779B97F4A7C15u;
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)((mixed ^ mixed >> 31) >> 32) % below;
}

void fibres_trace(const char *format, ...)
{
    if (!is_traced)
        return;
    va_list arguments;
    va_start(arguments, format);
    printf("%8s %8s    ", "", current >= 0 ? fibres[current].name : "");
    vprintf(format, arguments);
    putchar('\n');
    va_end(arguments);
}

bool fibres_are_traced(void)
{
    return is_traced;
}

uint64_t fibres_points(void)
{
    return points;
}

uint64_t fibres_fine_points(void)
{
    return fine_points;
}

uint64_t fibres_switches(void)
{
    return switches;
}
