/* What a block may contain.  See oracle.h. */
#include "oracle.h"

#include "disk.h"
#include "fibres.h"

#include <string.h>

static struct write writes[MOST_WRITES];
static unsigned write_count;
static uint64_t now;

void oracle_begin(void)
{
    write_count = 0;
    now = 0;
}

uint64_t oracle_now(void)
{
    return ++now;
}

/* ---- Names of values ------------------------------------------------------------------------- */

/* Zero is the one value that more than one write may leave, and what was there at first. */
static uint64_t name_of(const struct write *write, unsigned word)
{
    return write->is_zero ? 0 : (uint64_t)(write - writes + 1) << 32 | write->volume << 16 | (word + 1);
}

static bool covers(const struct write *write, unsigned volume, unsigned word)
{
    return write->volume == volume && word >= write->first_word && word < write->first_word + write->word_count;
}

/* Who wrote a word; NULL for zero. */
static struct write *writer_of(unsigned volume, unsigned word, uint64_t name, const char *whose)
{
    if (!name)
        return NULL;
    uint64_t number = name >> 32;
    struct write *write = &writes[number - 1];
    if (!number || number > write_count || !covers(write, volume, word) || name_of(write, word) != name)
        fibres_fail("%s: volume %u word %u has %lx, which nobody wrote there", whose, volume, word,
                    (unsigned long)name);
    return write;
}

/* ---- Writes ---------------------------------------------------------------------------------- */

struct write *oracle_write(unsigned volume, unsigned first_word, unsigned word_count, bool is_zero, uint64_t *words)
{
    if (write_count == MOST_WRITES)
        fibres_fail("too many writes for the oracle");
    struct write *write = &writes[write_count++];
    write->begin = oracle_now();
    write->end = NEVER;
    write->volume = volume;
    write->first_word = first_word;
    write->word_count = word_count;
    write->is_zero = is_zero;
    write->is_durable = write->is_partial = false;
    for (unsigned i = 0; i < word_count; i++) {
        write->first_end[i] = NEVER;
        write->last_begin[i] = write->begin;
        words[i] = name_of(write, first_word + i);
    }
    return write;
}

void oracle_written(struct write *write)
{
    write->end = oracle_now();
    for (unsigned i = 0; i < write->word_count; i++)
        if (write->end < write->first_end[i])
            write->first_end[i] = write->end;
}

void oracle_promise(uint64_t begin)
{
    for (unsigned i = 0; i < write_count; i++)
        writes[i].is_durable |= writes[i].end < begin;
}

/* ---- What was seen --------------------------------------------------------------------------- */

/* Whether the word may have been zero at some instant: some write that left zero, or the beginning, was not overwritten
 * by a whole write before. */
static bool may_be_zero(unsigned volume, unsigned word, uint64_t begin, uint64_t end)
{
    for (unsigned z = 0; z <= write_count; z++) {
        const struct write *zero = z ? &writes[z - 1] : NULL;
        if (zero && (!zero->is_zero || !covers(zero, volume, word) || zero->begin > end))
            continue;
        bool is_gone = false;
        for (unsigned i = 0; i < write_count && !is_gone; i++)
            is_gone = &writes[i] != zero && covers(&writes[i], volume, word) && writes[i].end < begin &&
                      (!zero || zero->end < writes[i].begin);
        if (!is_gone)
            return true;
    }
    return false;
}

/* Each write covers a word that the other one wrote last: no order of the two leaves such a block. */
static void require_whole(unsigned volume, unsigned first_word, const uint64_t *words, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        for (unsigned k = i + 1; k < count; k++) {
            const struct write *one = writer_of(volume, first_word + i, words[i], "a read");
            const struct write *other = writer_of(volume, first_word + k, words[k], "a read");
            if (one && other && one != other && covers(one, volume, first_word + k) &&
                covers(other, volume, first_word + i))
                fibres_fail("torn block: volume %u words %u and %u have %lx and %lx", volume, first_word + i,
                            first_word + k, (unsigned long)words[i], (unsigned long)words[k]);
        }
}

void oracle_seen(unsigned volume, unsigned first_word, unsigned word_count, const uint64_t *words, uint64_t begin,
                 uint64_t end, bool is_verified)
{
    for (unsigned i = 0; i < word_count; i++) {
        struct write *write = writer_of(volume, first_word + i, words[i], "a read");
        if (!write) {
            if (!may_be_zero(volume, first_word + i, begin, end))
                fibres_fail("volume %u word %u is zero, which it was not between %lu and %lu", volume, first_word + i,
                            (unsigned long)begin, (unsigned long)end);
            continue;
        }
        unsigned at = first_word + i - write->first_word;
        if (end < write->first_end[at])
            write->first_end[at] = end;
        if (begin > write->last_begin[at])
            write->last_begin[at] = begin;
    }
    for (unsigned i = 0, run; is_verified && i < word_count; i += run) {
        run = BLOCK_WORDS - (first_word + i) % BLOCK_WORDS;
        require_whole(volume, first_word + i, words + i, run < word_count - i ? run : word_count - i);
    }
}

/* ---- Pictures -------------------------------------------------------------------------------- */

static bool is_before(const struct write *one, const struct write *other)
{
    return !one ? other != NULL : other && one->end < other->begin;
}

/* Against each write that covers a word: the word must not be as before a write that was promised, and the picture was
 * taken before the end of each write that came wholly after what the word has. */
static void judge_word(unsigned volume, unsigned word, const struct write *seen, bool must_be_durable, uint64_t *latest,
                       const char *whose)
{
    for (unsigned i = 0; i < write_count; i++) {
        const struct write *other = &writes[i];
        if (!covers(other, volume, word) || other == seen)
            continue;
        bool is_later = seen ? seen->end < other->begin : !other->is_zero;
        /* Zeros may be those of any write of zeros. */
        for (unsigned z = 0; is_later && !seen && z < write_count; z++)
            is_later = !(writes[z].is_zero && covers(&writes[z], volume, word) && !(writes[z].end < other->begin));
        if (!is_later)
            continue;
        if (must_be_durable && other->is_durable)
            fibres_fail("%s: volume %u word %u is as before write %u, which was said to be durable", whose, volume,
                        word, i + 1);
        if (other->end < *latest)
            *latest = other->end;
    }
}

/* A write that is in some of its words, or under what came after it there, and surely not in another: only one that the
 * disk refused half way may be, of which its writer was told, if at all, that it failed. */
static void require_no_half(const struct picture *picture, const struct write *write, const char *whose)
{
    if (write->end == NEVER && disk_has_failed())
        return;
    bool is_in = false, is_out = false;
    for (unsigned word = write->first_word; word < write->first_word + write->word_count; word++) {
        const struct write *seen = writer_of(write->volume, word, picture->words[write->volume][word], whose);
        if (!seen)
            continue;
        is_in |= seen == write || is_before(write, seen);
        is_out |= is_before(seen, write);
    }
    if (is_in && is_out)
        fibres_fail("%s: write %u is in it by half", whose, (unsigned)(write - writes) + 1);
}

void oracle_judge_picture(const struct picture *picture, unsigned volumes, uint64_t begin, uint64_t end,
                          bool must_be_durable, const char *whose)
{
    uint64_t earliest = begin, latest = end;
    for (unsigned volume = 0; volume < VOLUMES; volume++)
        for (unsigned word = 0; volumes >> volume & 1 && word < WORDS; word++) {
            const struct write *seen = writer_of(volume, word, picture->words[volume][word], whose);
            if (seen && seen->begin > earliest)
                earliest = seen->begin;
            judge_word(volume, word, seen, must_be_durable, &latest, whose);
        }
    if (earliest > latest)
        fibres_fail("%s is no one point in time: it has what began at %lu, and lacks what had ended at %lu", whose,
                    (unsigned long)earliest, (unsigned long)latest);
    for (unsigned i = 0; i < write_count; i++)
        if (volumes >> writes[i].volume & 1 && !writes[i].is_partial && !writes[i].is_zero)
            require_no_half(picture, &writes[i], whose);
}

/* ---- The end --------------------------------------------------------------------------------- */

/* A value's zone lies between the first end and the last begin of whoever wrote or saw it: *forward* when the first end
 * comes first (the value was there all that time), else *backward* (it was there at some instant of it). */
struct zone {
    uint64_t low, high;
    bool is_forward;
};

static struct zone zone_of(const struct write *write, unsigned word)
{
    uint64_t end = write->first_end[word - write->first_word], begin = write->last_begin[word - write->first_word];
    return (struct zone){end < begin ? end : begin, end < begin ? begin : end, end < begin};
}

static void judge_pair(unsigned volume, unsigned word, const struct write *one, const struct write *other)
{
    struct zone a = zone_of(one, word), b = zone_of(other, word);
    if (!a.is_forward)
        return;
    bool is_wrong = b.is_forward ? a.low < b.high && b.low < a.high : a.low < b.low && b.high < a.high;
    if (is_wrong)
        fibres_fail("volume %u word %u: write %u was seen from %lu to %lu, but write %u lies in between", volume, word,
                    (unsigned)(one - writes) + 1, (unsigned long)a.low, (unsigned long)a.high,
                    (unsigned)(other - writes) + 1);
}

void oracle_judge(void)
{
    for (unsigned i = 0; i < write_count; i++)
        for (unsigned word = writes[i].first_word; word < writes[i].first_word + writes[i].word_count; word++) {
            if (!writes[i].is_zero && writes[i].first_end[word - writes[i].first_word] < writes[i].begin)
                fibres_fail("volume %u word %u was seen before write %u began", writes[i].volume, word, i + 1);
            for (unsigned k = 0; k < write_count && !writes[i].is_zero; k++)
                if (k != i && covers(&writes[k], writes[i].volume, word))
                    judge_pair(writes[i].volume, word, &writes[i], &writes[k]);
        }
}
