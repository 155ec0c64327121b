/* CRC32C with carry-less products of 64 bytes at a time, with the processor's instruction for it, three
 * stretches at a time, or with tables.
 *
 * The instruction of x86-64 takes three cycles but a new one can begin in each, so three independent
 * stretches run as fast as one.  Their checksums are joined by shifting: a checksum moves over n
 * zero bytes by a linear map, which for a fixed n is four table look-ups.
 */
#include "crc32c.h"

#include <stdbool.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.2")))
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

static uint32_t crc32c_portable(const void *data, size_t length)
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

static crc32c_way ways[3] = {crc32c_portable}; /* and what crc32c_init finds, the fastest last */
static crc32c_way chosen = crc32c_portable;

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

static inline __attribute__((always_inline)) HARDWARE uint32_t finished(uint32_t crc, const unsigned char *next, size_t length)
{
    for (; length >= 8; length -= 8, next += 8)
        crc = step8(crc, word_at(next));
    for (; length; length--, next++)
        crc = step1(crc, *next);
    return crc;
}

static HARDWARE uint32_t crc32c_hardware(const void *data, size_t length)
{
    const unsigned char *next = data;
    uint32_t crc = triples(~0u, &next, &length, LONG, over_long);
    crc = triples(crc, &next, &length, SHORT, over_short);
    return ~finished(crc, next, length);
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

/* ---- Carry-less products ---------------------------------------------------------------------------- */

#ifdef WIDE

/* Bytes are a polynomial, the first bit its highest power; only its remainder counts.  So 128 bits may be
 * taken out and their product with x^n added n bits further on: each half of them is multiplied by a
 * remainder of 32 bits, and both products fit into 128.  Bits are reversed in a word, as in the checksum:
 * a product comes out one place too high, and a remainder stands 32 places too high in its word, which is
 * why the powers are 33 less. */
enum { FOLDED = 256 }; /* bytes at a time: four registers, since a product takes some cycles */

static uint64_t by_lanes[2], by_registers[2], by_rounds[2];

static uint64_t remainder_of_power(unsigned power)
{
    uint32_t remainder = 0x80000000u;
    for (; power; power--)
        remainder = remainder & 1 ? remainder >> 1 ^ POLYNOMIAL : remainder >> 1;
    return remainder;
}

/* Fills the factors that move the two halves of 128 bits by so many bits. */
static void make_factors(uint64_t factors[2], unsigned bits)
{
    factors[0] = remainder_of_power(bits + 64 - 33);
    factors[1] = remainder_of_power(bits - 33);
}

static inline __attribute__((always_inline)) WIDE __m512i moved(__m512i value, __m512i factors, __m512i onto)
{
    __m512i first = _mm512_clmulepi64_epi128(value, factors, 0x00), second = _mm512_clmulepi64_epi128(value, factors, 0x11);
    return _mm512_xor_si512(_mm512_xor_si512(first, second), onto);
}

static inline __attribute__((always_inline)) WIDE __m512i factors_of(const uint64_t factors[2])
{
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)factors));
}

/* Joins the four parts of a register, and gives the checksum that they stand for. */
static inline __attribute__((always_inline)) WIDE uint32_t joined(__m512i value)
{
    __m128i factors = _mm_loadu_si128((const __m128i *)by_lanes), lanes[4];
    _mm512_storeu_si512(lanes, value);
    for (int i = 0; i < 3; i++) {
        __m128i first = _mm_clmulepi64_si128(lanes[i], factors, 0x00), second = _mm_clmulepi64_si128(lanes[i], factors, 0x11);
        lanes[i + 1] = _mm_xor_si128(lanes[i + 1], _mm_xor_si128(first, second));
    }
    return step8(step8(0, (uint64_t)_mm_extract_epi64(lanes[3], 0)), (uint64_t)_mm_extract_epi64(lanes[3], 1));
}

static WIDE uint32_t crc32c_wide(const void *data, size_t length)
{
    if (length < FOLDED)
        return crc32c_hardware(data, length);
    const unsigned char *next = data;
    __m512i value[4], factors = factors_of(by_rounds);
    for (int i = 0; i < 4; i++)
        value[i] = _mm512_loadu_si512(next + 64 * i);
    value[0] = _mm512_xor_si512(value[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(-1)));
    for (next += FOLDED, length -= FOLDED; length >= FOLDED; next += FOLDED, length -= FOLDED)
        for (int i = 0; i < 4; i++)
            value[i] = moved(value[i], factors, _mm512_loadu_si512(next + 64 * i));
    factors = factors_of(by_registers);
    for (int i = 0; i < 3; i++)
        value[i + 1] = moved(value[i], factors, value[i + 1]);
    return ~finished(joined(value[3]), next, length);
}

#endif /* WIDE */

void crc32c_init(void)
{
    make_tables();
#ifdef HARDWARE
    if (has_instruction()) {
        make_shift(over_long, LONG);
        make_shift(over_short, SHORT);
        chosen = ways[1] = crc32c_hardware;
    }
#endif
#ifdef WIDE
    if (ways[1] && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq")) {
        make_factors(by_lanes, 128);
        make_factors(by_registers, 512);
        make_factors(by_rounds, 8 * FOLDED);
        chosen = ways[2] = crc32c_wide;
    }
#endif
}

uint32_t crc32c(const void *data, size_t length)
{
    return chosen(data, length);
}

crc32c_way crc32c_ways(size_t number)
{
    return number < sizeof ways / sizeof *ways ? ways[number] : NULL;
}
