"""Settings of the test process; nothing here changes what a user gets.

The settings of JAX are this process's own: a test that starts another process
sees the defaults there.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator

import jax
import pytest

from experiments import _programs

NUM_DEVICES = 4

# Before the first use of JAX, which fixes the number of devices.
if "xla_force_host_platform_device_count" not in os.environ.get(
  "XLA_FLAGS", ""
):
  jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Oracles are NumPy's; accelerators multiply in less than float32 by default.
jax.config.update("jax_default_matmul_precision", "highest")

_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def pytest_configure(config: pytest.Config) -> None:
  # Neither reads nor fills the user's own cache, and opens no window.
  cache = tempfile.TemporaryDirectory(prefix="jaxmerge-test-cache-")
  config.add_cleanup(cache.cleanup)
  os.environ["XDG_CACHE_HOME"] = cache.name
  # Runs that go on, and those they are compared with, compile the same
  # programs. Each process of the tests has a folder of its own: JAX does not
  # write its entries under temporary names.
  jax.config.update("jax_compilation_cache_dir", f"{cache.name}/programs")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
  connect = socket.socket.connect

  def guarded(self, address):
    local = self.family == socket.AF_UNIX or address[0] in _LOCAL_HOSTS
    if not local:
      raise OSError(f"tests do not use the network: connect to {address}")
    return connect(self, address)

  monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="module")
def _bounded_programs() -> Iterator[None]:
  """Forgets what was compiled before it is too much for one process."""
  yield
  _programs.bound()
