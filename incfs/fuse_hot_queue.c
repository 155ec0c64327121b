/* The queue of requests that the hot threads leave to Python.  See fuse_hot.h for the rules.
 *
 * It has a lock of its own, held for a few instructions.
 */
#include "fuse_hot_internal.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { MOST_SPARES = 32 };

static int event_fd = -1;

static pthread_mutex_t queue_lock = PTHREAD_MUTEX_INITIALIZER; /* guards all below */
static struct item *first_item, *last_item;
static bool has_ended;
static int end_result;
static struct fuse_buf spares[MOST_SPARES];
static unsigned spare_count;

static void signal_queue(void)
{
    uint64_t one = 1;
    while (write(event_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

bool queue_open(void)
{
    event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return event_fd >= 0;
}

void queue_close(void)
{
    while (first_item) {
        struct item *item = first_item;
        first_item = item->next;
        free(item->buffer.mem);
        free(item);
    }
    last_item = NULL;
    while (spare_count)
        free(spares[--spare_count].mem);
    has_ended = false;
    if (event_fd >= 0)
        close(event_fd);
    event_fd = -1;
}

/* Puts a request into an item of its own, and takes a spare buffer in exchange if there is one. */
void put_away(struct item *item, struct fuse_buf *buffer, int result)
{
    *item = (struct item){.buffer = *buffer, .result = result};
    memset(buffer, 0, sizeof *buffer);
    pthread_mutex_lock(&queue_lock);
    if (spare_count)
        *buffer = spares[--spare_count];
    pthread_mutex_unlock(&queue_lock);
}

/* Leaves a request to Python. */
void hand_over(struct item *item)
{
    pthread_mutex_lock(&queue_lock);
    if (last_item)
        last_item->next = item;
    else
        first_item = item;
    last_item = item;
    signal_queue();
    pthread_mutex_unlock(&queue_lock);
}

void end_queue(int result)
{
    pthread_mutex_lock(&queue_lock);
    if (!has_ended)
        end_result = result;
    has_ended = true;
    signal_queue();
    pthread_mutex_unlock(&queue_lock);
}

static void keep_spare(struct fuse_buf *buffer)
{
    if (!buffer->mem)
        return;
    if (spare_count < MOST_SPARES)
        spares[spare_count++] = *buffer;
    else
        free(buffer->mem);
}

void free_item(struct item *item)
{
    pthread_mutex_lock(&queue_lock);
    keep_spare(&item->buffer);
    pthread_mutex_unlock(&queue_lock);
    free(item);
}

int hot_receive(struct fuse_buf *buffer)
{
    pthread_mutex_lock(&queue_lock);
    struct item *item = first_item;
    int result = has_ended ? end_result : -EINTR; /* on which pyfuse3 waits again */
    if (item) {
        first_item = item->next;
        if (!first_item)
            last_item = NULL;
        keep_spare(buffer);
        *buffer = item->buffer;
        result = item->result;
    }
    if (!first_item && !has_ended) {
        uint64_t count;
        while (read(event_fd, &count, sizeof count) < 0 && errno == EINTR)
            ;
    }
    pthread_mutex_unlock(&queue_lock);
    free(item);
    return result;
}

int hot_fd(void)
{
    return event_fd;
}
