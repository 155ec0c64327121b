/* Records of the journal, and what a power cut leaves of a pool.  See tables.h; the bytes are those of docs/FORMAT.md
 * as far as lane.c writes them. */
#include "crc32c.h"
#include "disk.h"
#include "fibres.h"
#include "tables.h"

#include <endian.h>
#include <string.h>

/* ---- Making records -------------------------------------------------------------------------- */

/* As lane.c has it: magic, length, sequence, nonce, checksum of the body; checksum of these. */
void encode_head(unsigned char *head, const char *magic, uint32_t length, uint64_t sequence, uint64_t nonce,
                 uint32_t checksum)
{
    memcpy(head, magic, 4);
    memcpy(head + 4, &length, 4);
    memcpy(head + 8, &sequence, 8);
    memcpy(head + 16, &nonce, 8);
    memcpy(head + 24, &checksum, 4);
    uint32_t own = crc32c(head, RECORD_HEAD_BYTES - 4);
    memcpy(head + RECORD_HEAD_BYTES - 4, &own, 4);
}

void encode_segment(unsigned char *sector, uint64_t number, uint64_t start_sequence, uint64_t nonce)
{
    memset(sector, 0, SECTOR_BYTES);
    encode_head(sector, "JSEG", number, start_sequence, nonce, 0);
}

/* The body of a record of the control plane; in a frame like all others, of a magic of its own. */
struct body {
    uint64_t folded;
    uint32_t change_count, data_blocks;
};

size_t encode_record(unsigned char *record, uint64_t sequence, uint64_t nonce, uint64_t folded,
                     const struct table_change *changes, unsigned count, const unsigned char *data,
                     unsigned data_blocks)
{
    struct body body = {folded, count, data_blocks};
    unsigned char *next = record + RECORD_HEAD_BYTES;
    memcpy(next, &body, sizeof body);
    next += sizeof body;
    memcpy(next, changes, count * sizeof *changes);
    next += count * sizeof *changes;
    memcpy(next, data, data_blocks * BLOCK_BYTES);
    next += data_blocks * BLOCK_BYTES;
    size_t length = next - record - RECORD_HEAD_BYTES;
    encode_head(record, "CREC", length, sequence, nonce, crc32c(record + RECORD_HEAD_BYTES, length));
    while ((next - record) % SECTOR_BYTES)
        *next++ = 0;
    return next - record;
}

/* ---- Reading them ---------------------------------------------------------------------------- */

struct head {
    char magic[4];
    uint32_t length;
    uint64_t sequence, nonce;
    uint32_t checksum;
};

static bool decode_head(const unsigned char *bytes, struct head *head)
{
    uint32_t own;
    memcpy(head->magic, bytes, 4);
    memcpy(&head->length, bytes + 4, 4);
    memcpy(&head->sequence, bytes + 8, 8);
    memcpy(&head->nonce, bytes + 16, 8);
    memcpy(&head->checksum, bytes + 24, 4);
    memcpy(&own, bytes + RECORD_HEAD_BYTES - 4, 4);
    return own == crc32c(bytes, RECORD_HEAD_BYTES - 4);
}

/* A pool as it is put together again. */
struct recovered {
    struct tables tables;
    unsigned char image[IMAGE_BLOCKS * BLOCK_BYTES];
    uint64_t stored_sequence;
    const uint64_t *freed_by;
};

/* Older tables would still name the blocks that a record writes to. */
static void require_folded(const struct recovered *pool, uint64_t folded, const struct table_change *maps,
                           unsigned count)
{
    if (folded > pool->stored_sequence)
        fibres_fail("a record goes with tables of record %lu, those stored are of %lu", (unsigned long)folded,
                    (unsigned long)pool->stored_sequence);
    for (unsigned i = 0; i < count; i++)
        if (maps[i].kind == CHANGE_MAP && maps[i].mapping.address > PLANE_HOLE &&
            pool->freed_by[maps[i].mapping.address - STORAGE] > folded)
            fibres_fail("a record uses block %lu, which tables of record %lu still name",
                        (unsigned long)(maps[i].mapping.address - STORAGE), (unsigned long)folded);
}

static void put_block(struct recovered *pool, uint64_t address, const unsigned char *data)
{
    memcpy(pool->image + (address - STORAGE) * BLOCK_BYTES, data, BLOCK_BYTES);
}


static void replay_control(struct recovered *pool, const unsigned char *next)
{
    struct body body;
    memcpy(&body, next, sizeof body);
    const unsigned char *changes = next + sizeof body;
    const unsigned char *data = changes + body.change_count * sizeof(struct table_change);
    for (unsigned i = 0; i < body.change_count; i++) {
        struct table_change change;
        memcpy(&change, changes + i * sizeof change, sizeof change);
        require_folded(pool, body.folded, &change, 1);
        tables_apply(&pool->tables, &change, NULL);
        if (change.kind == CHANGE_MAP && change.mapping.address > PLANE_HOLE && body.data_blocks) {
            put_block(pool, change.mapping.address, data);
            data += BLOCK_BYTES;
        }
    }
}

/* The msgpack that lane.c writes: its arrays and binaries have 32 bits of length, its numbers 7 or 64. */
static uint32_t get_head(const unsigned char **next, unsigned char kind)
{
    uint32_t big;
    if (**next != kind)
        fibres_fail("a record has %02x where %02x belongs", **next, kind);
    memcpy(&big, *next + 1, 4);
    *next += 5;
    return be32toh(big);
}

static uint64_t get_number(const unsigned char **next)
{
    if (**next < 128)
        return *(*next)++;
    uint64_t big;
    if (**next != 0xcf)
        fibres_fail("a record has %02x where a number belongs", **next);
    memcpy(&big, *next + 1, 8);
    *next += 9;
    return be64toh(big);
}

static void get_text(const unsigned char **next, char text[32])
{
    unsigned length = *(*next)++ & 0x1f;
    memcpy(text, *next, length);
    text[length] = '\0';
    *next += length;
}

struct lane_record {
    struct table_change maps[MOST_CHANGES_PENDING];
    unsigned count;
};

static void get_run(struct lane_record *record, const unsigned char **next, unsigned volume)
{
    uint64_t block = get_number(next), count = get_number(next), address = get_number(next);
    uint32_t length = get_head(next, 0xc6);
    if (length != (address > PLANE_HOLE ? 4 * count : 0))
        fibres_fail("a record has %u bytes of checksums for %lu blocks", length, (unsigned long)count);
    for (uint64_t i = 0; i < count && record->count < MOST_CHANGES_PENDING; i++) {
        struct plane_mapping mapping = {address > PLANE_HOLE ? address + i : address, 0};
        if (length)
            memcpy(&mapping.checksum, *next + 4 * i, 4);
        record->maps[record->count++] =
            (struct table_change){CHANGE_MAP, volume, block + i - FIRST_BLOCK, mapping, 0, 0, 0};
    }
    *next += length;
}

static void get_change(struct lane_record *record, const unsigned char **next)
{
    char text[32];
    get_head(next, 0xdd);
    get_text(next, text);
    unsigned volume = get_number(next) - 1;
    if (strcmp(text, "written") == 0) {
        get_number(next);
        return;
    }
    uint32_t runs = get_head(next, 0xdd) / 4;
    while (runs--)
        get_run(record, next, volume);
}

static void replay_lane(struct recovered *pool, const unsigned char *next)
{
    struct lane_record record = {.count = 0};
    get_head(&next, 0xdd);
    for (uint32_t changes = get_head(&next, 0xdd); changes; changes--)
        get_change(&record, &next);
    uint32_t length = get_head(&next, 0xc6);
    for (unsigned i = 0; i < record.count; i++) {
        tables_apply(&pool->tables, &record.maps[i], NULL);
        if (record.maps[i].mapping.address <= PLANE_HOLE)
            continue;
        if (length < BLOCK_BYTES)
            fibres_fail("a record lacks data");
        put_block(pool, record.maps[i].mapping.address, next);
        next += BLOCK_BYTES;
        length -= BLOCK_BYTES;
    }
    require_folded(pool, get_number(&next), record.maps, record.count);
}

/* ---- Recovery -------------------------------------------------------------------------------- */

static void replay_segment(struct recovered *pool, const unsigned char *journal, size_t length)
{
    struct head segment, head;
    decode_head(journal, &segment);
    uint64_t expected = segment.sequence;
    for (size_t at = SECTOR_BYTES; at + SECTOR_BYTES <= length; expected++) {
        const unsigned char *body = journal + at + RECORD_HEAD_BYTES;
        if (!decode_head(journal + at, &head) || head.sequence != expected || head.nonce != segment.nonce ||
            memcmp(head.magic + 1, "REC", 3) || at + RECORD_HEAD_BYTES + head.length > length ||
            crc32c(body, head.length) != head.checksum)
            return;
        if (head.sequence == pool->tables.sequence + 1) {
            pool->tables.sequence = head.sequence;
            if (head.magic[0] == 'J')
                replay_lane(pool, body);
            else
                replay_control(pool, body);
        }
        at += (RECORD_HEAD_BYTES + head.length + SECTOR_BYTES - 1) / SECTOR_BYTES * SECTOR_BYTES;
    }
}

static bool has_segment(const unsigned char *journal, uint64_t number)
{
    struct head head;
    return decode_head(journal, &head) && memcmp(head.magic, "JSEG", 4) == 0 && head.length == number;
}

static void recover(struct recovered *pool, const struct tables *stored, bool with_unflushed)
{
    pool->tables = *stored;
    memcpy(pool->image, disk_after_cut(IMAGE, with_unflushed), sizeof pool->image);
    for (uint64_t number = stored->segment; number < stored->segment + 2; number++) {
        enum disk_file file = number % 2 ? OTHER_JOURNAL : JOURNAL;
        const unsigned char *journal = disk_after_cut(file, with_unflushed);
        if (!has_segment(journal, number)) {
            if (number == stored->segment)
                fibres_fail("segment %lu of the journal is gone", (unsigned long)number);
            return;
        }
        replay_segment(pool, journal, disk_used(file));
    }
}

void judge_cut(const struct tables *stored, const uint64_t freed_by[IMAGE_BLOCKS], bool with_unflushed)
{
    static struct recovered pool;
    static struct picture picture;
    static const char whose[] = "after a power cut";
    pool.stored_sequence = stored->sequence;
    pool.freed_by = freed_by;
    recover(&pool, stored, with_unflushed);
    picture_live(&pool.tables, pool.image, &picture, whose);
    oracle_judge_picture(&picture, (1 << VOLUMES) - 1, 0, oracle_now(), true, whose);
    judge_snapshots(&pool.tables, pool.image, "a snapshot after a power cut", false);
}
