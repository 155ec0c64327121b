"""Stripe maps: which storage volumes a volume's new stripes rotate over.

Old data stays where its mappings say; the rows before the newest only tell how it came there.
Each function is one step of the owner thread.
"""

from collections.abc import Sequence

from incfs.errors import StorageNotFound, UsageError
from incfs.memory import one_step
from incfs.model import MAX_STRIPE_COLUMNS, MAX_STRIPE_ROWS, StorageId, StripeRow, Volume, VolumeId
from incfs.placement import choose_columns, replace_low
from incfs.settings import VolumeSettings
from incfs.store import Store


@one_step
def set_columns(store: Store, volume_id: VolumeId, columns: Sequence[StorageId], *, unit_bytes: int) -> Volume:
    """Let new stripes of a volume rotate over these storage volumes, one a column.

    Raises:
        UsageError: No columns, too many, one twice, or a unit that is not whole blocks.
        StorageNotFound: One does not exist.
    """
    volume = store.catalog.volume(volume_id)
    row = new_row(store, columns, unit_bytes=unit_bytes)
    return store.amend(
        volume, stripes=(*volume.stripes, (row.since_ns, row.unit_blocks, *row.columns))[-MAX_STRIPE_ROWS:]
    )


def new_row(store: Store, columns: Sequence[StorageId], *, unit_bytes: int) -> StripeRow:
    """Make the row of these columns that would hold from now on.

    Raises:
        UsageError, StorageNotFound: As ``set_columns``.
    """
    if not 1 <= len(columns) <= MAX_STRIPE_COLUMNS or len(set(columns)) != len(columns):
        raise UsageError(f"a stripe map has 1 to {MAX_STRIPE_COLUMNS} different columns, not {list(columns)}")
    require_unit(store, unit_bytes)
    for column in columns:
        if column not in store.catalog.storages:
            raise StorageNotFound(f"there is no storage volume {column}", storage=column)
    return StripeRow(store.clock(), unit_bytes // store.block_bytes, tuple(columns))


def require_unit(store: Store, unit_bytes: int) -> None:
    """Refuse a stripe unit that is not whole blocks.

    Raises:
        UsageError: It is not.
    """
    if unit_bytes < store.block_bytes or unit_bytes % store.block_bytes:
        raise UsageError(f"a stripe unit is a multiple of the block size {store.block_bytes}, not {unit_bytes}")


def set_count(store: Store, volume_id: VolumeId, count: int, *, unit_bytes: int) -> Volume:
    """Let new stripes rotate over that many storage volumes, of those that the placement rules allow.

    Raises:
        UsageError: There are not so many.
    """
    return set_columns(store, volume_id, choose(store, volume_id, count), unit_bytes=unit_bytes)


def choose(store: Store, volume_id: VolumeId, count: int) -> tuple[StorageId, ...]:
    """Choose the columns of a volume's new stripes, of the storage volumes that its placement rules allow.

    Raises:
        UsageError: There are not so many.
    """
    rooms = store.space.candidates(store.catalog.volume(volume_id).map_id)
    columns = choose_columns(rooms, count)
    if len(columns) < count:
        raise UsageError(
            f"{count} stripe columns need as many storage volumes; {len(columns)} can be used: add some",
            columns=count,
        )
    return columns


def follow_settings(store: Store, volume_id: VolumeId, settings: VolumeSettings) -> Volume:
    """Give a new volume the stripes that its settings ask for, as far as there are storage volumes."""
    volume = store.catalog.volume(volume_id)
    count = min(settings.stripe_columns, len(store.space.candidates(volume.map_id)))
    return set_count(store, volume_id, count, unit_bytes=settings.stripe_unit_bytes) if count > 1 else volume


def leave_low_columns(store: Store) -> list[tuple[Volume, tuple[int, ...], tuple[int, ...]]]:
    """Replace columns at low water by storage volumes that are not; give (volume, columns before, columns now)."""
    changed: list[tuple[Volume, tuple[int, ...], tuple[int, ...]]] = []
    for volume in list(store.catalog.volumes.values()):
        row = volume.stripe_row
        if row is None or not volume.name:
            continue
        columns = tuple(StorageId(column) for column in row.columns)
        better = replace_low(columns, store.space.candidates(volume.map_id))
        if better != columns:
            unit_bytes = row.unit_blocks * store.block_bytes
            changed.append((set_columns(store, volume.id, better, unit_bytes=unit_bytes), row.columns, better))
    return changed
