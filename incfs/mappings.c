#include "mappings.h"

#include <endian.h>
#include <stdbool.h>
#include <string.h>

/* With more runs than this the raw form is smaller: a run costs about 16 bytes, a raw mapping 12. */
enum { RUNS = 1, RAW = 2, RAW_ABOVE_RUNS = 96, BITMAP_BYTES = PLANE_PAGE_BLOCKS / 8 };

/* msgpack's first bytes. */
enum { FIXINT_END = 0x80, FIXARRAY = 0x90, BIN8 = 0xc4, BIN32 = 0xc6, UINT8 = 0xcc, UINT64 = 0xcf, ARRAY16 = 0xdc, ARRAY32 };

void mappings_put(struct mappings *page, const struct mapping *above, size_t count)
{
    struct mappings below;
    if (!page->count || !count || page->of[page->count - 1].index < above[0].index) { /* nothing to be sorted in */
        memcpy(page->of + page->count, above, count * sizeof *above);
        page->count += count;
        return;
    }
    below.count = page->count;
    memcpy(below.of, page->of, page->count * sizeof *page->of);
    page->count = 0;
    for (size_t i = 0, k = 0; i < below.count || k < count;) {
        bool is_above = k < count && (i == below.count || above[k].index <= below.of[i].index);
        i += is_above && i < below.count && above[k].index == below.of[i].index;
        page->of[page->count++] = is_above ? above[k++] : below.of[i++];
    }
}

void mappings_drop_inherited(struct mappings *page)
{
    size_t kept = 0;
    for (size_t i = 0; i < page->count; i++)
        if (page->of[i].address != PLANE_INHERIT)
            page->of[kept++] = page->of[i];
    page->count = kept;
}

/* ---- Encoding ------------------------------------------------------------------------------------- */

/* Consecutive blocks with consecutive addresses, or all without data. */
static size_t run_length(const struct mappings *page, size_t first)
{
    const struct mapping *run = &page->of[first];
    size_t step = run->address > PLANE_HOLE, count = 1;
    while (first + count < page->count && run[count].index == run->index + count &&
           run[count].address == run->address + step * count)
        count++;
    return count;
}

static size_t count_runs(const struct mappings *page)
{
    size_t runs = 0;
    for (size_t i = 0; i < page->count; i += run_length(page, i))
        runs++;
    return runs;
}

static uint8_t *put_big_endian(uint8_t *target, uint64_t value, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        target[i] = (uint8_t)(value >> 8 * (bytes - 1 - i));
    return target + bytes;
}

/* In as few bytes as msgpack has for it. */
static uint8_t *put_uint(uint8_t *target, uint64_t value)
{
    if (value < FIXINT_END) {
        *target = (uint8_t)value;
        return target + 1;
    }
    unsigned log = value >> 32 ? 3 : value >> 16 ? 2 : value >> 8 ? 1 : 0;
    *target = (uint8_t)(UINT8 + log);
    return put_big_endian(target + 1, value, 1u << log);
}

static uint8_t *put_checksums(uint8_t *target, const struct mapping *run, size_t count)
{
    size_t bytes = run->address > PLANE_HOLE ? 4 * count : 0;
    unsigned log = bytes >> 8 ? 1 : 0;
    *target = (uint8_t)(BIN8 + log);
    target = put_big_endian(target + 1, bytes, 1u << log);
    for (size_t i = 0; 4 * i < bytes; i++, target += 4)
        memcpy(target, &(uint32_t){htole32(run[i].checksum)}, 4);
    return target;
}

static size_t encode_runs(const struct mappings *page, size_t runs, uint8_t *target)
{
    uint8_t *end = target;
    *end++ = RUNS;
    if (4 * runs < 16) {
        *end++ = (uint8_t)(FIXARRAY + 4 * runs);
    } else {
        *end++ = ARRAY16;
        end = put_big_endian(end, 4 * runs, 2);
    }
    for (size_t i = 0, count; i < page->count; i += count) {
        count = run_length(page, i);
        end = put_uint(end, page->of[i].index);
        end = put_uint(end, count);
        end = put_uint(end, page->of[i].address);
        end = put_checksums(end, &page->of[i], count);
    }
    return (size_t)(end - target);
}

static size_t encode_raw(const struct mappings *page, uint8_t *target)
{
    uint8_t *bitmap = target + 1, *addresses = bitmap + BITMAP_BYTES, *checksums = addresses + 8 * page->count;
    *target = RAW;
    memset(bitmap, 0, BITMAP_BYTES);
    for (size_t i = 0; i < page->count; i++) {
        const struct mapping *mapping = &page->of[i];
        bitmap[mapping->index / 8] |= (uint8_t)(1 << mapping->index % 8);
        memcpy(addresses + 8 * i, &(uint64_t){htole64(mapping->address)}, 8);
        memcpy(checksums + 4 * i, &(uint32_t){htole32(mapping->checksum)}, 4);
    }
    return 1 + BITMAP_BYTES + 12 * page->count;
}

size_t mappings_encode(const struct mappings *page, uint8_t target[MAPPINGS_MAX_BYTES])
{
    size_t runs = count_runs(page);
    return runs <= RAW_ABOVE_RUNS ? encode_runs(page, runs, target) : encode_raw(page, target);
}

/* ---- Decoding ------------------------------------------------------------------------------------- */

struct input {
    const uint8_t *next, *end;
};

static bool take_big_endian(struct input *input, unsigned bytes, uint64_t *value)
{
    if ((size_t)(input->end - input->next) < bytes)
        return false;
    *value = 0;
    for (unsigned i = 0; i < bytes; i++)
        *value = *value << 8 | *input->next++;
    return true;
}

/* Reads a value of which msgpack has forms of 1, 2, 4 (and 8) bytes, from first byte `first` on. */
static bool take_sized(struct input *input, unsigned first, unsigned last, uint64_t *value)
{
    if (input->next == input->end || *input->next < first || *input->next > last)
        return false;
    unsigned log = *input->next++ - first;
    return take_big_endian(input, 1u << log, value);
}

static bool take_uint(struct input *input, uint64_t *value)
{
    if (input->next < input->end && *input->next < FIXINT_END) {
        *value = *input->next++;
        return true;
    }
    return take_sized(input, UINT8, UINT64, value);
}

static bool take_array(struct input *input, uint64_t *length)
{
    if (input->next < input->end && *input->next >= FIXARRAY && *input->next < FIXARRAY + 16) {
        *length = *input->next++ - FIXARRAY;
        return true;
    }
    if (input->next == input->end || *input->next < ARRAY16 || *input->next > ARRAY32)
        return false;
    unsigned bytes = *input->next++ == ARRAY16 ? 2 : 4;
    return take_big_endian(input, bytes, length);
}

static const char *decode_run(struct mappings *page, struct input *input)
{
    uint64_t first, count, address, bytes;
    if (!take_uint(input, &first) || !take_uint(input, &count) || !take_uint(input, &address))
        return "a run holds something other than integers from 0 on";
    if (first >= PLANE_PAGE_BLOCKS || !count || count > PLANE_PAGE_BLOCKS - first || address > UINT64_MAX - (count - 1))
        return "a run is out of range";
    if (page->count && page->of[page->count - 1].index >= first)
        return "runs are not in order";
    bool is_stored = address > PLANE_HOLE;
    if (!take_sized(input, BIN8, BIN32, &bytes) || bytes > (size_t)(input->end - input->next) ||
        bytes != (is_stored ? 4 * count : 0))
        return "a run has the wrong number of checksums";
    for (size_t i = 0; i < count; i++) {
        uint32_t checksum = 0;
        if (is_stored)
            memcpy(&checksum, input->next + 4 * i, 4);
        page->of[page->count++] = (struct mapping){address + is_stored * i, le32toh(checksum), (uint16_t)(first + i)};
    }
    input->next += bytes;
    return NULL;
}

static const char *decode_runs(struct mappings *page, struct input input)
{
    uint64_t length;
    if (!take_array(&input, &length) || length % 4)
        return "runs are not a list of quadruples";
    for (uint64_t i = 0; i < length / 4; i++) {
        const char *wrong = decode_run(page, &input);
        if (wrong)
            return wrong;
    }
    return input.next == input.end ? NULL : "bytes follow the runs";
}

static const char *decode_raw(struct mappings *page, struct input input)
{
    const uint8_t *bitmap = input.next;
    if (input.end - bitmap < BITMAP_BYTES)
        return "the raw form is cut off";
    for (uint16_t index = 0; index < PLANE_PAGE_BLOCKS; index++)
        if (bitmap[index / 8] >> index % 8 & 1)
            page->of[page->count++].index = index;
    const uint8_t *addresses = bitmap + BITMAP_BYTES, *checksums = addresses + 8 * page->count;
    if ((size_t)(input.end - addresses) != 12 * page->count)
        return "the raw form has the wrong length";
    for (size_t i = 0; i < page->count; i++) {
        uint64_t address;
        uint32_t checksum;
        memcpy(&address, addresses + 8 * i, 8);
        memcpy(&checksum, checksums + 4 * i, 4);
        page->of[i].address = le64toh(address);
        page->of[i].checksum = le32toh(checksum);
    }
    return NULL;
}

const char *mappings_decode(struct mappings *page, const uint8_t *data, size_t length)
{
    page->count = 0;
    struct input rest = {data + 1, data + length};
    if (length && *data == RUNS)
        return decode_runs(page, rest);
    if (length && *data == RAW)
        return decode_raw(page, rest);
    return "unknown encoding";
}
