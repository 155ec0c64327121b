"""The benchmark of incfs against its peers: one harness, the same jobs, interleaved.  See README.md."""
