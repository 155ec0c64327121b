/* Any bytes are a page or are refused; what is a page is encoded and decoded to the same; changes go above it.
 *
 * usage: mappings_fuzz SECONDS SEED
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mappings.h"

static uint64_t state;

static uint64_t draw(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

static void die(const char *what)
{
    printf("wrong: %s\n", what);
    exit(1);
}

static void draw_page(struct mappings *page)
{
    uint64_t density = 1 + draw(40), address = (1 + draw(3)) << 48;
    page->count = 0;
    for (uint16_t index = 0; index < PLANE_PAGE_BLOCKS; index++) {
        if (draw(40) >= density)
            continue;
        address += 1 + draw(density);
        uint64_t found = draw(16) ? address : draw(2);
        uint32_t checksum = found > PLANE_HOLE ? (uint32_t)draw(UINT32_MAX) : 0;
        page->of[page->count++] = (struct mapping){found, checksum, index};
    }
}

static void require_same(const struct mappings *left, const struct mappings *right)
{
    if (left->count != right->count)
        die("another number of mappings");
    for (size_t i = 0; i < left->count; i++)
        if (left->of[i].index != right->of[i].index || left->of[i].address != right->of[i].address ||
            left->of[i].checksum != right->of[i].checksum)
            die("another mapping");
}

/* In memory of just this length, so that a read behind it is seen. */
static const char *decode_exactly(struct mappings *page, const uint8_t *data, size_t length)
{
    uint8_t *exact = malloc(length ? length : 1);
    memcpy(exact, data, length);
    const char *wrong = mappings_decode(page, exact, length);
    free(exact);
    return wrong;
}

static void require_page(const struct mappings *page)
{
    for (size_t i = 0; i < page->count; i++)
        if (page->of[i].index >= PLANE_PAGE_BLOCKS || (i && page->of[i].index <= page->of[i - 1].index))
            die("not ascending");
}

static void damage(uint8_t *body, size_t *length)
{
    for (uint64_t i = draw(4); i > 0; i--)
        body[draw(*length)] = (uint8_t)draw(256);
    if (!draw(3))
        *length = draw(*length + 1);
}

static void put_and_compare(struct mappings *page, const struct mappings *above)
{
    struct mapping expected[PLANE_PAGE_BLOCKS];
    bool has[PLANE_PAGE_BLOCKS] = {false};
    for (size_t i = 0; i < page->count; i++)
        expected[page->of[i].index] = page->of[i], has[page->of[i].index] = true;
    for (size_t i = 0; i < above->count; i++)
        expected[above->of[i].index] = above->of[i], has[above->of[i].index] = true;
    mappings_put(page, above->of, above->count);
    size_t next = 0;
    for (size_t index = 0; index < PLANE_PAGE_BLOCKS; index++)
        if (has[index] && (next == page->count || page->of[next++].address != expected[index].address))
            die("a change is not above what was there");
    if (next != page->count)
        die("a mapping came from nowhere");
}

int main(int argc, char **argv)
{
    time_t end = time(NULL) + (argc > 1 ? atoi(argv[1]) : 2);
    state = 88172645463325252u + (argc > 2 ? (uint64_t)atoi(argv[2]) : 0);
    unsigned long rounds = 0, pages = 0;
    for (; time(NULL) < end; rounds++) {
        struct mappings page, other;
        uint8_t body[MAPPINGS_MAX_BYTES];
        draw_page(&page);
        size_t length = mappings_encode(&page, body);
        if (length > sizeof body || decode_exactly(&other, body, length))
            die("what was encoded is no page");
        require_same(&page, &other);
        draw_page(&other);
        put_and_compare(&page, &other);
        damage(body, &length);
        if (decode_exactly(&other, body, length))
            continue;
        pages++;
        require_page(&other);
        mappings_drop_inherited(&other);
        if (mappings_encode(&other, body) > sizeof body)
            die("a page is too long");
    }
    printf("ok: %lu rounds, %lu damaged pages that are pages\n", rounds, pages);
    return 0;
}
