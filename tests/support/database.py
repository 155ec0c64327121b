"""A service that takes its time to end, and whose last act counts: database.py FILE.

It appends a record and makes it durable, again and again; told to end it thinks for a while, writes its checkpoint and
says so.
"""

import os
import signal
import sys
import time

THINKS_S = 4
asked: list[bool] = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_APPEND)
while not asked:
    os.write(fd, b"record\n")
    os.fsync(fd)
    time.sleep(0.2)
time.sleep(THINKS_S)
os.write(fd, b"checkpoint\n")
os.fsync(fd)
print(f"{sys.argv[1]}: checkpoint durable", flush=True)
