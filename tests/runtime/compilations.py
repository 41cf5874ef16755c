"""The beginning of a script that counts compilations: `compiled` gets a kernel's name for each, and nothing else."""

COMPILATIONS = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from fused_attn import testing
from fused_attn.testing.cases import Case
from fused_attn.backends.triton import portable, statistics

class Driver:
    # As much of a GPU as the launch path asks for.
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

class Kernel:
    function = packed_metadata = None
    def launch_metadata(self, *args): return None
    def run(self, *args): pass

compiled = []
def do_compile(self, key, signature, device, *rest, **options):
    compiled.append(self.fn.__name__)
    kernel = self.device_caches[device][0][key] = Kernel()
    return kernel

triton.runtime.driver.set_active(Driver())
JITFunction._do_compile = do_compile

"""
