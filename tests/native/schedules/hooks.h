/* What runs find in place of the system's locks and memory.  See hooks.c. */
#ifndef HOOKS_H
#define HOOKS_H

/* Before a run: all memory of the last one is gone. */
void hooks_begin(void);
/* Pieces of memory that are not freed. */
long hooks_live_count(void);
/* Of what the product allocated. */
void hooks_free(void *memory);

#endif
