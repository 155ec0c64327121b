"""Metrics of a real daemon, over its socket."""

import http.client
import socket

from tests.mount.conftest import mounted_pool


def test_metrics_over_a_unix_socket(tmp_path):
    path = tmp_path / "metrics.sock"
    with mounted_pool(tmp_path, f"metrics={path}") as pool:
        (pool / "db").write_bytes(b"x" * 8192)
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(path))
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        assert 'incfs_volume_size_bytes{volume="db"} 8192' in text
        assert "incfs_fuse_op_duration_seconds_count" in text
    assert not path.exists()
