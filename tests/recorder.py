"""A recorder of what passes through the transformer of a pipeline."""

# Shapes: S steps

from contextlib import contextmanager

import oracle
import torch
from harness import allowed
from torch.nn.utils.rnn import pad_sequence


class Recorder:
    """What passes through a transformer: per branch the latents [S, ...], timesteps [S], predictions [S, ...]."""

    def __init__(self, transformer):
        self.calls = {}
        self.told = []  # (latents, prediction) of every call, in turn
        self.first = []  # (latents, version) of the calls of the first nameless branch
        self.transformer = transformer
        transformer.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module, args, inputs, output):
        given = args[0] if args else inputs["hidden_states"]
        inputs = inputs | dict(zip(module.denoiser.manifest.pipeline.positional, args[1:], strict=False))
        if isinstance(inputs.get("cap_feats"), list):  # the words of each sample
            mask = pad_sequence([torch.ones(len(words)).long() for words in inputs["cap_feats"]], batch_first=True)
            inputs |= {"cap_feats": pad_sequence(inputs["cap_feats"], batch_first=True), "cap_mask": mask}
        conditioning = {
            n: v if isinstance(v, torch.Tensor) else torch.stack(v) if n == "image_rotary_emb" else torch.tensor(v)
            for n, v in inputs.items()
            if n in module.denoiser.constants and v is not None
        }
        answer = output[0] if isinstance(output, tuple) else output.sample
        latents, sample = (torch.stack(v).squeeze(2) if isinstance(v, list) else v for v in (given, answer))
        timestep = inputs[module.denoiser.timestep.name]
        # Two nameless calls on the same latents are two branches.
        version = getattr(given, "_version", 0)  # some pipelines write the next latents over those before
        nameless = str(int(any(given is one and version == of for one, of in self.first)))
        context = module._callers.here.context
        self.first += [(given, version)] if nameless == "0" else []
        given, latents = (x.clone() if isinstance(x, torch.Tensor) else x for x in (given, latents))
        self.calls.setdefault(context.name if context else nameless, []).append(
            (latents, timestep, conditioning, sample)
        )
        self.told.append((given, answer))

    @contextmanager
    def retold_by(self, model):
        """The untouched model answers every call with the prediction noted for it, which is refused for other latents.

        A pipeline around it is then told what one around the transformer was, to the bit: bits of a product of two
        matrices are the processor's choice, and everything else that a pipeline does must be the same.
        """
        told = iter(self.told)

        def answer(module, args, inputs, output):
            latents, sample = next(told)
            given = args[0] if args else inputs["hidden_states"]
            pairs = zip(given, latents, strict=True) if isinstance(given, list) else [(given, latents)]
            assert all(torch.equal(*pair) for pair in pairs), "the untouched pipeline asks about other latents"
            return (sample,) if isinstance(output, tuple) else type(output)(sample=sample)

        handle = model.register_forward_hook(answer, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        assert next(told, None) is None, "the untouched pipeline makes fewer calls"

    def assert_plan(self, model, plan, order):
        """Every branch ran `plan`, in every loop, and agrees with the oracle on the latents that it was given."""
        assert set(self.transformer.executed.values()) == {plan}
        loops = [(n, c[k : k + len(plan)]) for n, c in self.calls.items() for k in range(0, len(c), len(plan))]
        for name, calls in loops:
            latents, timestep, conditioning, seen = zip(*calls, strict=True)
            timestep = torch.stack([t.flatten()[-1] for t in timestep])  # where tokens have their own, that of the last
            seen = torch.stack(seen)
            expected = oracle.replay(model, torch.stack(latents), timestep, conditioning[0], plan, order)
            expected = expected[:, :, : seen.shape[2]]  # of rows that only condition, a model predicts nothing of use
            limit = allowed(model, expected, plan, order)
            oracle.assert_close(f"branch {name}", seen, expected, limit)
