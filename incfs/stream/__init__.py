"""The send stream: snapshots, and what changed between them, as one sequence of bytes.  Pure.

``docs/STREAM.md`` has the format field by field.  ``records`` says what a stream consists of,
``frames`` how it is framed, ``encoder`` makes one, ``reader`` takes one apart and proves it,
``ranges`` puts ranges into their canonical form, ``merge`` makes one stream of two, ``token``
tells how far one came.  Nothing here does I/O.
"""
