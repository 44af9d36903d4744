"""Settings of the test process; nothing here changes what a user gets.

The settings of JAX are this process's own: a test that starts another process
sees the defaults there, but for the flags of the compiler, which it inherits.
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

# Nearly all of the time of the tests is the compilation of small programs that
# run once: the compiler optimizes less and works on one thread. Flags that are
# given win: XLA_FLAGS=--xla_backend_optimization_level=3 python -m pytest
QUICK_COMPILATION = {
  # At 0, sums that are promised to be equal bit for bit are not.
  "xla_backend_optimization_level": "1",
  "xla_cpu_parallel_codegen_split_count": "1",
}
# XLA ends the process at a flag that it does not know.
if jax.__version_info__ < (0, 11):
  QUICK_COMPILATION["xla_cpu_use_fusion_emitters"] = "false"

# Before the first use of JAX, which reads the flags and fixes the number of
# devices.
_GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
  [
    _GIVEN,
    *(f"--{k}={v}" for k, v in QUICK_COMPILATION.items() if k not in _GIVEN),
  ]
).strip()
if "xla_force_host_platform_device_count" not in _GIVEN:
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
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
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
