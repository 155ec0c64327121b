/* The host's files, in memory: what programs see of each (the page cache), and what a power cut leaves. */
#ifndef DISK_H
#define DISK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum disk_file { IMAGE, OTHER_LEG, JOURNAL, OTHER_JOURNAL, DISK_FILES };
enum { FIRST_FD = 1000, JOURNAL_BYTES = 96 << 10, IMAGE_BYTES = 8 << 10 };

/* One operation that goes wrong. */
enum fault {
    NO_FAULT,
    FAULT_FLUSH,
    FAULT_WRITE_JOURNAL,
    FAULT_WRITE_IMAGE,
    FAULT_IMAGE_FULL,
    FAULT_JOURNAL_FULL,
    FAULT_READ_IMAGE
};

struct disk_faults {
    enum fault kind;
    unsigned at, count; /* the at-th of its kind, and those behind it */
    unsigned miss_percent; /* of reads that shall not wait */
    bool is_short; /* some counts are */
    /* RWF_NOWAIT works; it does not, and the files are in memory; it does not. */
    enum { TELLS, IS_MEMORY, DOES_NOT_TELL } waiting;
};

/* Before a run: all files are empty. */
void disk_begin(void);
/* From now on. */
void disk_fail(const struct disk_faults *faults);
int disk_fd(enum disk_file file);
/* Whether the fault has happened. */
bool disk_has_failed(void);
/* What programs see. */
const unsigned char *disk_cache(enum disk_file file);
/* What a power cut now would leave: what was flushed, and any choice of the sectors that were not. */
const unsigned char *disk_after_cut(enum disk_file file, bool with_unflushed);
/* Bytes of a file that were ever written. */
size_t disk_used(enum disk_file file);
/* Signals that wait in the one descriptor that is no file. */
uint64_t disk_signals(void);

int64_t hooks_pread64(int fd, void *buffer, size_t length, int64_t offset);
int64_t hooks_pwrite64(int fd, const void *bytes, size_t length, int64_t offset);
int hooks_fdatasync(int fd);

#endif
