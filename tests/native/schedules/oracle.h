/* What a block may contain: a history of writes and of what was seen, judged word by word.
 *
 * Each write marks each of its words with its own number, so that whoever sees a word knows who wrote it.  A word is a
 * register: there must be an order of all its writes and reads that agrees with when each began and ended (it is
 * linearizable).  With a name for each value that is so exactly when the zones of the values fit each other
 * (Gibbons and Korach, 1997): see oracle_judge.
 */
#ifndef ORACLE_H
#define ORACLE_H

#include <stdbool.h>
#include <stdint.h>

enum {
    VOLUMES = 2,
    BLOCKS = 8, /* of each volume that are used, over the end of a page */
    BLOCK_WORDS = 8,
    BLOCK_BYTES = 8 * BLOCK_WORDS,
    WORDS = BLOCKS * BLOCK_WORDS,
    MOST_WRITES = 96,
};
static const uint64_t NEVER = UINT64_MAX;

struct write {
    uint64_t begin, end; /* NEVER: it failed, or nobody was told yet */
    unsigned volume, first_word, word_count;
    bool is_zero;
    bool is_durable; /* somebody was told so */
    bool is_partial; /* it failed half-way, so parts of it may be seen */
    /* Of each word: the earliest end and the latest begin of whoever wrote or saw it. */
    uint64_t first_end[WORDS], last_begin[WORDS];
};

/* Words of everything at one point in time. */
struct picture {
    uint64_t words[VOLUMES][WORDS];
};

void oracle_begin(void);
/* A moment: each is later than the one before. */
uint64_t oracle_now(void);

/* Begins a write; `words` gets what is to be written. */
struct write *oracle_write(unsigned volume, unsigned first_word, unsigned word_count, bool is_zero, uint64_t *words);
void oracle_written(struct write *write);
/* Everything written before `begin` is durable: somebody was told. */
void oracle_promise(uint64_t begin);

/* Notes what was seen by somebody who began to look at `begin` and has ended now.  `is_verified`: by blocks. */
void oracle_seen(unsigned volume, unsigned first_word, unsigned word_count, const uint64_t *words, uint64_t begin,
                 uint64_t end, bool is_verified);
/* A picture of some volumes was taken at one point in time, between `begin` and `end`; no write is in it by half.
 * With `must_be_durable` it has what was promised. */
void oracle_judge_picture(const struct picture *picture, unsigned volumes, uint64_t begin, uint64_t end,
                          bool must_be_durable, const char *whose);
/* At the end: whether there is an order that explains everything. */
void oracle_judge(void);

#endif
