/* CRC32C (Castagnoli), as the mappings store it for every block. */
#ifndef INCFS_CRC32C_H
#define INCFS_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Chooses the fastest way that this processor has; call once, before crc32c. */
void crc32c_init(void);

/* Returns the checksum of `data`; the same value as Python's crc32c.crc32c(data). */
uint32_t crc32c(const void *data, size_t length);

/* The same by each of the ways that this processor has, the slowest first, for tests; NULL behind the last. */
typedef uint32_t (*crc32c_way)(const void *data, size_t length);
crc32c_way crc32c_ways(size_t number);

#endif
