/* Tables of volumes and snapshots.  See tables.h. */
#include "tables.h"

#include "crc32c.h"
#include "fibres.h"

#include <string.h>

int newest_snapshot(const struct tables *tables, unsigned volume)
{
    int newest = -1;
    for (int i = 0; i < SNAPSHOTS; i++)
        if (tables->snapshots[volume][i].is_taken)
            newest = i;
    return newest;
}

static void give_up(const struct plane_mapping *mapping, on_freed freed)
{
    if (freed && mapping->address > PLANE_HOLE)
        freed(mapping->address);
}

/* The mapping goes into an increment that lacks the block; else nothing names it any more. */
static void displace(struct snapshot *snapshot, unsigned block, struct plane_mapping mapping, on_freed freed)
{
    if (!snapshot || snapshot->has[block]) {
        give_up(&mapping, freed);
        return;
    }
    snapshot->has[block] = true;
    snapshot->increment[block] = mapping;
}

static void apply_map(struct tables *tables, const struct table_change *change, on_freed freed)
{
    int newest = newest_snapshot(tables, change->volume);
    struct plane_mapping *live = &tables->live[change->volume][change->block];
    displace(newest < 0 ? NULL : &tables->snapshots[change->volume][newest], change->block, *live, freed);
    *live = change->mapping;
}

/* What the newest snapshot kept goes to the one before it, or to nobody. */
static void fold(struct tables *tables, unsigned volume, on_freed freed)
{
    int newest = newest_snapshot(tables, volume);
    struct snapshot *snapshot = &tables->snapshots[volume][newest];
    for (unsigned block = 0; block < BLOCKS; block++)
        if (snapshot->has[block])
            displace(newest ? snapshot - 1 : NULL, block, snapshot->increment[block], freed);
    memset(snapshot->has, 0, sizeof snapshot->has);
    snapshot->is_removed = true;
}

void tables_apply(struct tables *tables, const struct table_change *change, on_freed freed)
{
    int newest = newest_snapshot(tables, change->volume);
    struct snapshot *snapshots = tables->snapshots[change->volume];
    if (change->kind == CHANGE_MAP)
        apply_map(tables, change, freed);
    else if (change->kind == CHANGE_SNAPSHOT)
        snapshots[newest + 1] =
            (struct snapshot){.is_taken = true, .begin = change->begin, .end = change->end, .number = change->number};
    else if (change->kind == CHANGE_FOLD)
        fold(tables, change->volume, freed);
    else if (change->kind == CHANGE_DROP)
        memset(&snapshots[newest], 0, sizeof *snapshots);
}

struct plane_mapping snapshot_mapping(const struct tables *tables, unsigned volume, unsigned snapshot, unsigned block)
{
    for (unsigned i = snapshot; i < SNAPSHOTS && tables->snapshots[volume][i].is_taken; i++)
        if (tables->snapshots[volume][i].has[block])
            return tables->snapshots[volume][i].increment[block];
    return tables->live[volume][block];
}

static void picture_block(struct plane_mapping mapping, unsigned volume, unsigned block, const unsigned char *image,
                          struct picture *picture, const char *whose)
{
    uint64_t *words = &picture->words[volume][block * BLOCK_WORDS];
    memset(words, 0, BLOCK_BYTES);
    if (mapping.address <= PLANE_HOLE)
        return;
    uint64_t at = mapping.address - STORAGE;
    if (at >= IMAGE_BLOCKS)
        fibres_fail("%s: volume %u block %u lies at %lx, where no image is", whose, volume, block,
                    (unsigned long)mapping.address);
    if (crc32c(image + at * BLOCK_BYTES, BLOCK_BYTES) != mapping.checksum)
        fibres_fail("%s: volume %u block %u at %lu is damaged", whose, volume, block, (unsigned long)at);
    memcpy(words, image + at * BLOCK_BYTES, BLOCK_BYTES);
}

void picture_live(const struct tables *tables, const unsigned char *image, struct picture *picture, const char *whose)
{
    for (unsigned volume = 0; volume < VOLUMES; volume++)
        for (unsigned block = 0; block < BLOCKS; block++)
            picture_block(tables->live[volume][block], volume, block, image, picture, whose);
}

void picture_snapshot(const struct tables *tables, unsigned volume, unsigned snapshot, const unsigned char *image,
                      struct picture *picture, const char *whose)
{
    for (unsigned block = 0; block < BLOCKS; block++)
        picture_block(snapshot_mapping(tables, volume, snapshot, block), volume, block, image, picture, whose);
}

/* The other volume's snapshot of the same moment: its index, or -1. */
static int twin_of(const struct tables *tables, unsigned volume, uint64_t number)
{
    for (int i = 0; i < SNAPSHOTS; i++)
        if (tables->snapshots[volume][i].is_taken && !tables->snapshots[volume][i].is_removed &&
            tables->snapshots[volume][i].number == number)
            return i;
    return -1;
}

static void judge_group(const struct tables *tables, uint64_t number, const unsigned char *image, const char *whose,
                        bool is_seen)
{
    struct picture picture;
    unsigned volumes = 0;
    uint64_t begin = 0, end = 0;
    for (unsigned volume = 0; volume < VOLUMES; volume++) {
        int i = twin_of(tables, volume, number);
        if (i < 0)
            continue;
        volumes |= 1 << volume;
        begin = tables->snapshots[volume][i].begin;
        end = tables->snapshots[volume][i].end;
        picture_snapshot(tables, volume, i, image, &picture, whose);
        if (is_seen)
            oracle_seen(volume, 0, WORDS, picture.words[volume], begin, end, false);
    }
    oracle_judge_picture(&picture, volumes, begin, end, false, whose);
}

void judge_snapshots(const struct tables *tables, const unsigned char *image, const char *whose, bool is_seen)
{
    uint64_t judged[VOLUMES * SNAPSHOTS];
    unsigned count = 0;
    for (unsigned volume = 0; volume < VOLUMES; volume++)
        for (unsigned i = 0; i < SNAPSHOTS && tables->snapshots[volume][i].is_taken; i++) {
            uint64_t number = tables->snapshots[volume][i].number;
            bool is_judged = tables->snapshots[volume][i].is_removed;
            for (unsigned k = 0; k < count; k++)
                is_judged |= judged[k] == number;
            if (is_judged)
                continue;
            judged[count++] = number;
            judge_group(tables, number, image, whose, is_seen);
        }
}
