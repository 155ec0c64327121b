/* CRC32C with the processor's instruction, three stretches at a time, or with tables.
 *
 * The instruction of x86-64 takes three cycles but a new one can begin in each, so three independent
 * stretches run as fast as one.  Their checksums are joined by shifting: a checksum moves over n
 * zero bytes by a linear map, which for a fixed n is four table look-ups.
 */
#include "crc32c.h"

#include <stdbool.h>
#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define HARDWARE __attribute__((target("sse4.2")))
#define step8(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define step1(crc, byte) _mm_crc32_u8((crc), (byte))
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#define HARDWARE __attribute__((target("+crc")))
#define step8(crc, word) __crc32cd((crc), (word))
#define step1(crc, byte) __crc32cb((crc), (byte))
#endif

#define POLYNOMIAL 0x82F63B78u /* reversed */

/* ---- Plain C: eight bytes at a time ------------------------------------------------------------ */

static uint32_t tables[8][256];

static void make_tables(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
        tables[0][byte] = crc;
    }
    for (int slice = 1; slice < 8; slice++)
        for (int byte = 0; byte < 256; byte++)
            tables[slice][byte] = tables[slice - 1][byte] >> 8 ^ tables[0][tables[slice - 1][byte] & 0xFF];
}

uint32_t crc32c_portable(const void *data, size_t length)
{
    const unsigned char *next = data;
    uint32_t crc = ~0u;
    for (; length >= 8; length -= 8, next += 8) {
        crc ^= next[0] | (uint32_t)next[1] << 8 | (uint32_t)next[2] << 16 | (uint32_t)next[3] << 24;
        crc = tables[7][crc & 0xFF] ^ tables[6][crc >> 8 & 0xFF] ^ tables[5][crc >> 16 & 0xFF] ^ tables[4][crc >> 24] ^
              tables[3][next[4]] ^ tables[2][next[5]] ^ tables[1][next[6]] ^ tables[0][next[7]];
    }
    for (; length; length--, next++)
        crc = crc >> 8 ^ tables[0][(crc ^ *next) & 0xFF];
    return ~crc;
}

static uint32_t (*chosen)(const void *, size_t) = crc32c_portable;

/* ---- The instruction ------------------------------------------------------------------------------ */

#ifdef HARDWARE

/* Lengths of one of the three stretches: 3 * 1344 is a 4 KiB block but for 64 bytes, 3 * 168 a 512
 * byte sector but for 8. */
enum { LONG = 1344, SHORT = 168 };

static uint32_t over_long[4][256], over_short[4][256];

/* Fills `shift` so that it moves a checksum over `length` zero bytes. */
static void make_shift(uint32_t shift[4][256], size_t length)
{
    uint32_t basis[32];
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = 1u << bit;
        for (size_t i = 0; i < length; i++)
            crc = crc >> 8 ^ tables[0][crc & 0xFF];
        basis[bit] = crc;
    }
    for (int position = 0; position < 4; position++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t sum = 0;
            for (int bit = 0; bit < 8; bit++)
                if (byte >> bit & 1)
                    sum ^= basis[8 * position + bit];
            shift[position][byte] = sum;
        }
}

static inline uint32_t shifted(const uint32_t shift[4][256], uint32_t crc)
{
    return shift[0][crc & 0xFF] ^ shift[1][crc >> 8 & 0xFF] ^ shift[2][crc >> 16 & 0xFF] ^ shift[3][crc >> 24];
}

static inline uint64_t word_at(const unsigned char *data)
{
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

/* Takes as many triples of stretches of `stretch` bytes as there are. */
static inline __attribute__((always_inline)) HARDWARE uint32_t triples(uint32_t crc, const unsigned char **data,
                                                                     size_t *length, size_t stretch,
                                                                     const uint32_t shift[4][256])
{
    const unsigned char *next = *data;
    for (; *length >= 3 * stretch; *length -= 3 * stretch, next += 3 * stretch) {
        uint32_t second = 0, third = 0;
        for (size_t i = 0; i < stretch; i += 8) {
            crc = step8(crc, word_at(next + i));
            second = step8(second, word_at(next + stretch + i));
            third = step8(third, word_at(next + 2 * stretch + i));
        }
        crc = shifted(shift, crc) ^ second;
        crc = shifted(shift, crc) ^ third;
    }
    *data = next;
    return crc;
}

static HARDWARE uint32_t crc32c_hardware(const void *data, size_t length)
{
    const unsigned char *next = data;
    uint32_t crc = triples(~0u, &next, &length, LONG, over_long);
    crc = triples(crc, &next, &length, SHORT, over_short);
    for (; length >= 8; length -= 8, next += 8)
        crc = step8(crc, word_at(next));
    for (; length; length--, next++)
        crc = step1(crc, *next);
    return ~crc;
}

static bool has_instruction(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2");
#else
    return getauxval(AT_HWCAP) & HWCAP_CRC32;
#endif
}

#endif /* HARDWARE */

void crc32c_init(void)
{
    make_tables();
#ifdef HARDWARE
    if (has_instruction()) {
        make_shift(over_long, LONG);
        make_shift(over_short, SHORT);
        chosen = crc32c_hardware;
    }
#endif
}

uint32_t crc32c(const void *data, size_t length)
{
    return chosen(data, length);
}
