"""A double of AOTInductor packages that were built for a GPU, over functions on memory of the host.

| promise of the library, refused or answered here as there | read in |
|---|---|
| whoever makes a model finds its GPU the current one afterwards | 1 |
| a run goes to the current stream of the current GPU, wherever its tensors lie | 2 |
| `run_single_threaded` is for one run at a time | 3 |
| without it a run asks for events and records one, which a capture does not hold | 1, 3 |
| the first run after weights were loaded folds constants: it allocates, and waits for the GPU | 1, 3 |
| weights have known names, all of them, and are on the GPU of the model; RuntimeError otherwise | 3, 4 |
| weights that are the user's own are read where they are, and a capture goes on to read those that it saw | 3 |
| they are held on to for ever, after their model as well | 5 |
| `boxed_run` empties the list that it is given | 6 |
| an input that does not start at a multiple of 16 bytes is replaced by a copy: what is written to it is lost | 7 |

Of torch 2.13: 1: aoti_runtime/model_base.h. 3: aoti_runtime/model_container.h. 5: MaybeOwningAtenTensorHandle of
aoti_runtime/utils.h, and tried. 7: _inductor/codegen/cpp_wrapper_gpu.py. In torch's repository: 2:
aoti_runner/model_container_runner_cuda.cpp. 4: aoti_package/model_package_loader.cpp. 6: aoti_package/pybind.cpp.
Not looked at here: that every model that is asked of a package loads all of them, which takes time alone, and a swap of
weights in a second buffer, which we do not make.
"""

import threading

import torch

from taylorseer_export.bundle.contract import NOTE, signature

ALIGNED = 16  # bytes


class Package:
    """What `load_package` and `load_file` find in one folder.

    Args:
        cuda: The double of `torch.cuda`.
        graphs: Graph name -> contract.
        functions: Graph name -> function of its weights by name, its inputs and its outputs, that fills the latter.
        weights: Graph name -> names of its weights; each is one number, 2.

    Attributes:
        events: (what was loaded, where to, the GPU that was current).
        kept: Weights that the library holds on to.
        recorded: Streams that torch's allocator was told of for weights.
    """

    def __init__(self, cuda, graphs, functions, weights):
        self.cuda, self.graphs, self.functions, self.weights = cuda, graphs, functions, weights
        self.events, self.kept, self.recorded = [], [], []

    def load_package(self, path, name, run_single_threaded=False, num_runners=1, device_index=-1):
        self.events.append(("package", device_index, self.cuda.gpu))
        self.cuda.gpu = device_index
        return Model(self, name, device_index, run_single_threaded)

    def load_file(self, path, device):
        self.events.append(("weights", device, self.cuda.gpu))
        made = {name: torch.full((1,), 2.0) for names in self.weights.values() for name in names}
        for tensor in made.values():
            tensor.place, tensor.record_stream = device, self.recorded.append
        return made


class Model:
    """One model of a package; it is its loader as well."""

    def __init__(self, package, name, gpu, alone):
        self.package, self.cuda, self.name, self.gpu, self.alone = package, package.cuda, name, gpu, alone
        self.loader, self.busy, self.weights = self, threading.Lock(), {}
        self.folded = self.captured = False

    def get_metadata(self):
        return {NOTE: signature(self.package.graphs[self.name])}

    def get_constant_fqns(self):
        return list(self.package.weights[self.name])

    def load_constants(self, tensors, *, check_full_update, user_managed=False):
        known = self.get_constant_fqns()
        if strange := tensors.keys() - set(known):
            raise RuntimeError(f"Constant not found: {min(strange)}")
        if check_full_update and (missing := set(known) - tensors.keys()):
            raise RuntimeError(f"Cannot find constants {min(missing)} in constants_map!")
        if wrong := [name for name, tensor in tensors.items() if tensor.place != f"cuda:{self.gpu}"]:
            raise RuntimeError(f"constant '{min(wrong)}' is on another device than expected")
        assert not self.captured, "weights are loaded after a capture, which goes on to read the old ones"
        self.package.events.append(("constants", f"cuda:{self.gpu}", self.cuda.gpu))
        self.package.kept += tensors.values()
        self.weights, self.folded = {n: t if user_managed else t.clone() for n, t in tensors.items()}, False

    def boxed_run(self, inputs):
        tensors, captures = list(inputs), self.cuda.capturing is not None
        inputs.clear()
        assert self.weights.keys() == set(self.get_constant_fqns()), "a run without weights"
        assert all(tensor.numel() for tensor in self.weights.values()), (
            "a run reads weights whose memory was given back"
        )
        assert self.cuda.gpu == self.gpu, "a run where another GPU is current, to a stream of that"
        assert self.alone or not captures, "a run asks for an event within a capture"
        assert self.folded or not captures, "constants are folded within a capture"
        assert all(t.data_ptr() % ALIGNED == 0 for t in tensors), (
            "an input is copied, and what is written there is lost"
        )
        assert self.busy.acquire(blocking=False) or not self.alone, "two runs at one time of a model for one"
        try:
            self.folded, self.captured = True, self.captured or captures
            self.package.functions[self.name](self.weights, *tensors)
        finally:
            if self.alone:
                self.busy.release()
        return []
