"""Writes stamps to volumes and says on the third serial port which of them are durable: stamper.py MNT.

A block holds its sequence number all over.  "VOLUME BLOCK SEQUENCE" is said when the fsync after the write returned.
"""

import os
import random
import struct
import sys

BLOCK_BYTES, BLOCKS, VOLUMES = 4096, 2048, 3
port = os.open("/dev/ttyS2", os.O_WRONLY | os.O_NOCTTY)
files = []
for volume in range(VOLUMES):
    files.append(os.open(f"{sys.argv[1]}/stamped{volume}", os.O_RDWR | os.O_CREAT))
    os.ftruncate(files[-1], BLOCKS * BLOCK_BYTES)
rng = random.Random(1)
sequence = 0
while True:
    volume = rng.randrange(VOLUMES)
    said = b""
    for block in rng.sample(range(BLOCKS), rng.choice([1, 1, 1, 4, 16])):
        sequence += 1
        os.pwrite(files[volume], struct.pack("<Q", sequence) * (BLOCK_BYTES // 8), block * BLOCK_BYTES)
        said += b"%d %d %d\n" % (volume, block, sequence)
    os.fsync(files[volume])
    os.write(port, said)
