"""The oracle against what must hold of it, with no other implementation at hand."""

# Shapes: S steps, B batch, C width; features [B, tokens, C]

import ast
import copy
import sys
from fractions import Fraction as Q
from pathlib import Path

import oracle
import pytest
import torch
from oracle import Oracle, assert_close, bound, extent, gains, replay, seen_by, tapped, weights
from tiny_models import dit_inputs, flux_inputs, tiny_dit, tiny_flux

pytestmark = pytest.mark.slow

GRANULARITIES = ("module", "residual", "last")
FLUX_PLAN = "FFF.....F.....F....."  # interval 6, warm-up 3


@pytest.fixture(scope="module")
def flux():
    return tiny_flux()


@pytest.fixture(scope="module")
def dit():
    return tiny_dit()


@pytest.fixture(params=["flux", "flux without guidance", "dit"], scope="module")
def case(request):
    """(model, inputs): a model and a function of the number of steps."""
    if request.param == "dit":
        model = tiny_dit(seed=1)
        return model, lambda steps: dit_inputs(model, steps, batch=2)
    model = tiny_flux(seed=1, guidance=request.param == "flux")
    return model, lambda steps: flux_inputs(model, steps, batch=2, height=2, width=4)


def double(model):
    return torch.nn.Module.to(copy.deepcopy(model), torch.float64)


class Toy(torch.nn.Module):
    """out = x + gate * ff; gate and feature ff are functions of the timestep."""

    class Block(torch.nn.Module):
        def __init__(self, feature):
            super().__init__()
            self.ff = torch.nn.Module()
            self.ff.forward = feature

        def forward(self, hidden_states, timestep):
            return hidden_states + (1 + timestep**2).reshape(-1, 1) * self.ff(timestep)

    def __init__(self, feature):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList([self.Block(feature)])
        self.norm_out = torch.nn.Identity()

    def forward(self, hidden_states, timestep, return_dict):
        return (self.norm_out(self.transformer_blocks[0](hidden_states, timestep)),)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(oracle.FAMILIES, "Toy", oracle.FAMILIES["DiTTransformer2DModel"])
    return lambda plan, order, feature: replay(
        Toy(feature), torch.ones(len(plan), 1, 3), torch.arange(len(plan)).double(), {}, plan, order
    )


def test_float64_and_model_untouched(case):
    model, inputs = case
    for granularity in GRANULARITIES:
        assert replay(model, *inputs(3), "FF.", 1, granularity).dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_every_site_is_tapped(flux, dit):
    attn = [f"transformer_blocks.{i}.{m}" for i in range(2) for m in ("attn", "ff", "ff_context")]
    single = [f"single_transformer_blocks.{i}.proj_out" for i in range(2)]
    assert [name for name, *_ in tapped(flux)] == attn + single
    assert [name for name, *_ in tapped(dit)] == [
        f"transformer_blocks.{i}.{m}" for i in range(3) for m in ("attn1", "ff")
    ]
    runner = Oracle(flux, "F", 1)
    x, t, conditioning = flux_inputs(flux, 1)
    runner.step(x[0], t[0], conditioning)
    assert len(runner.series) == 2 * 4 + 2  # attention gives image and text


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_all_full_is_the_plain_model(case, granularity):
    model, inputs = case
    x, t, conditioning = inputs(3)
    replayed = replay(model, x, t, conditioning, "FFF", 2, granularity)
    plain = double(model)
    for s in range(3):
        rest = {k: v.double() if v.is_floating_point() else v for k, v in conditioning.items()}
        with torch.no_grad():
            expected = plain(x[s].double(), timestep=t[s].expand(2), return_dict=False, **rest)[0]
        assert torch.equal(replayed[s], expected)


def test_order_0_is_reuse_with_fresh_gates(dit):
    """DiT's forecast step by hand: embed, add old outputs by new gates, final layer."""
    x, t, conditioning = dit_inputs(dit, 3, batch=2)
    seen = replay(dit, x, t, conditioning, "F..", 0)
    model = double(dit)
    old = {}
    for name, module, _ in tapped(model):
        module.register_forward_hook(lambda m, a, out, name=name: old.update({name: out}))
    labels = conditioning["class_labels"]
    with torch.no_grad():
        model(x[0].double(), timestep=t[0].expand(2), class_labels=labels)
        for s in (1, 2):
            h = model.pos_embed(x[s].double())  # [B, 16, C]
            for i, block in enumerate(model.transformer_blocks):
                emb = block.norm1.emb(t[s].expand(2), labels, hidden_dtype=torch.float64)
                chunks = block.norm1.linear(torch.nn.functional.silu(emb)).chunk(6, dim=1)
                h = h + chunks[2][:, None] * old[f"transformer_blocks.{i}.attn1"]
                h = h + chunks[5][:, None] * old[f"transformer_blocks.{i}.ff"]
            emb = model.transformer_blocks[0].norm1.emb(t[s].expand(2), labels, hidden_dtype=torch.float64)
            shift, scale = model.proj_out_1(torch.nn.functional.silu(emb)).chunk(2, dim=1)
            h = model.proj_out_2(model.norm_out(h) * (1 + scale[:, None]) + shift[:, None])
            h = h.reshape(2, 4, 4, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 8, 8)
            assert_close(f"step {s}", seen[s], h, 1e-13)


def test_linear_features_are_exact(toy):
    def linear(t):
        return (2 - 3 * t).reshape(-1, 1).expand(-1, 3)

    plan = "FF..F...F.."
    plain = toy("F" * len(plan), 0, linear)
    for order in (1, 2, 3):
        assert_close(f"order {order}", toy(plan, order, linear), plain, 1e-10)
    assert (toy(plan, 0, linear) - plain).abs().max() > 1
    seen, plain = (toy(p, 2, lambda t: linear(t) ** 2) for p in (plan, "F" * len(plan)))
    assert (seen - plain).abs().max() > 1  # and the method is not exact on quadratics


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_history_starts_one_step_before_the_warmup_ends(case, granularity):
    model, inputs = case
    x, t, conditioning = inputs(8)

    def outputs(plan, order, changed=None):
        y = x.clone()
        if changed is not None:
            y[changed] += 0.5
        return replay(model, y, t, conditioning, plan, order, granularity)[3:]

    reference = outputs("FFF..F..", 2)
    assert torch.equal(outputs("FFF..F..", 2, changed=0), reference)
    assert not torch.equal(outputs("FFF..F..", 2, changed=1), reference)
    reuse, linear = outputs("F...F...", 0), outputs("F...F...", 1)
    assert torch.equal(reuse[:2], linear[:2])  # steps 3, 4: one snapshot, then a full step
    assert not torch.equal(reuse[2], linear[2])


def test_text_tokens_are_dead_and_the_rest_is_live(flux, dit):
    x, t, conditioning = flux_inputs(flux, 4)
    live = {"module": 4, "residual": 4, "last": 3}  # of latent, timestep, pooled text, guidance
    for granularity in GRANULARITIES:

        def last(granularity=granularity, latent=x[3], timestep=t[3], **changed):
            runner = Oracle(flux, "FFF.", 2, granularity)
            for s in range(3):
                runner.step(x[s], t[s], conditioning)
            return runner.step(latent, timestep, conditioning | changed)

        reference = last()
        text = conditioning["encoder_hidden_states"]
        assert torch.equal(last(encoder_hidden_states=text.flip(1) * 2), reference)
        others = [
            last(latent=x[3] + 1),
            last(timestep=t[3] * 0.9),
            last(pooled_projections=conditioning["pooled_projections"] + 1),
            last(guidance=conditioning["guidance"] + 1),
        ]
        assert sum(not torch.equal(o, reference) for o in others) == live[granularity]
    x, t, conditioning = dit_inputs(dit, 4)
    runs = []
    for label in (0, 1):
        runner = Oracle(dit, "FFF.", 2)
        for s in range(3):
            runner.step(x[s], t[s], conditioning)
        runs.append(runner.step(x[3], t[3], {"class_labels": torch.tensor([label])}))
    assert not torch.equal(*runs)


@pytest.mark.parametrize(
    ("plan", "order", "step", "expected"),
    [
        (FLUX_PLAN, 1, 3, {1: -1, 2: 2}),
        (FLUX_PLAN, 1, 7, {1: -5, 2: 6}),
        (FLUX_PLAN, 1, 9, {2: Q(-1, 6), 8: Q(7, 6)}),
        (FLUX_PLAN, 1, 13, {2: Q(-5, 6), 8: Q(11, 6)}),
        (FLUX_PLAN, 2, 9, {1: Q(1, 12), 2: Q(-19, 72), 8: Q(85, 72)}),
        (FLUX_PLAN, 2, 13, {1: Q(25, 12), 2: Q(-235, 72), 8: Q(157, 72)}),
        (FLUX_PLAN, 2, 15, {2: Q(1, 72), 8: Q(-7, 36), 14: Q(85, 72)}),
        (FLUX_PLAN, 2, 19, {2: Q(25, 72), 8: Q(-55, 36), 14: Q(157, 72)}),
        ("FFF...F...", 2, 5, {1: -3, 2: 4}),
        ("FFF...F...", 2, 9, {1: Q(9, 8), 2: Q(-69, 32), 6: Q(65, 32)}),
        ("F....F....", 2, 4, {0: 1}),
    ],
)
def test_weights_of_the_recursion(plan, order, step, expected, toy):
    assert weights(plan, step, order) == expected
    assert sum(expected.values()) == 1
    assert gains(plan, order)[step] == float(sum(abs(w) for w in expected.values()))

    def feature(t):  # [B, 1], nowhere near a polynomial
        return torch.cos(t * t).reshape(-1, 1)

    ff = sum(float(w) * torch.cos(torch.tensor(float(s * s)).double()) for s, w in expected.items())
    assert_close("toy", toy(plan, order, feature)[step], (1 + (1 + step**2) * ff).expand(1, 3), 1e-9)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forecasts_mean_something(case, granularity):
    """On the smooth inputs order 1 beats reuse, and both are close to the plain model."""
    model, inputs = case
    given, plan = inputs(15), "FFF...F...F...F"
    plain = replay(model, *given, "F" * 15, 0)
    reuse, linear = (
        ((replay(model, *given, plan, order, granularity) - plain).norm() / plain.norm()).item() for order in (0, 1)
    )
    assert linear < 0.85 * reuse < 0.25


def test_blocks_contribute(case):
    """Gates do not vanish: the stack adds as much as the embedding has, within a factor of 5."""
    model, inputs = case
    x, t, conditioning = inputs(1)
    runner = Oracle(model, "F", 0, "residual")
    runner.step(x[0], t[0], conditioning)
    ((name, embedding),) = runner.embedding.items()
    added = runner.series[name].derivatives[0]
    assert 0.2 < (added.norm() / embedding.norm()).item() < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", ["FFF", "FFF..F.."])
def test_bound_holds_and_is_not_idle(case, dtype, plan):
    model, inputs = case
    x, t, conditioning = inputs(len(plan))
    scaled = {k: seen_by(v, dtype) for k, v in conditioning.items() if k == "guidance"}
    timestep = seen_by(t, dtype) if t.is_floating_point() else t
    for granularity in GRANULARITIES if "." in plan else ("module",):
        exact = replay(model, x, timestep, conditioning | scaled, plan, 2, granularity)
        eager = replay(model, x, t, conditioning, plan, 2, granularity, dtype)
        limit = bound(exact, gains(plan, 2), dtype, *extent(model))
        assert 0.01 < assert_close(f"{granularity} {dtype}", eager, exact, limit) < 0.6
        assert limit.max() <= bound(exact, max(gains(plan, 2)), dtype, *extent(model))


def test_assert_close_can_fail():
    expected = torch.linspace(-1, 1, 12).reshape(3, 4)
    limit = bound(expected, 2.0, torch.float32, 4, 64)
    assert assert_close("same", expected, expected, limit) == 0
    seen = expected.clone()
    seen[1, 2] += 2 * limit
    with pytest.raises(AssertionError, match=r"noise differs by .* at \(1, 2\), expected at most"):
        assert_close("noise", seen, expected, limit)
    assert_close("loose step", seen, expected, torch.tensor([limit, 3 * limit, limit]))
    with pytest.raises(AssertionError, match=r"at \(1, 2\)"):
        assert_close("tight step", seen, expected, torch.tensor([limit, limit, 3 * limit]))
    for bad in (float("nan"), float("inf")):
        seen[2, 0] = bad
        with pytest.raises(AssertionError, match=r"at \(2, 0\)"):
            assert_close("noise", seen, expected, limit)
    with pytest.raises(AssertionError, match=r"is \[1, 3, 4\], expected \[3, 4\]"):
        assert_close("noise", expected[None], expected, limit)


def test_imports_nothing_of_ours():
    root = Path(oracle.__file__).parents[1]
    allowed = {*sys.stdlib_module_names, "torch", "diffusers", "randomised"}
    for name in ("tests/oracle.py", "tools/tiny_models.py", "tools/randomised.py"):
        for node in ast.walk(ast.parse((root / name).read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module.split(".")[0] in allowed
            elif isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                assert called not in {"__import__", "import_module", "exec", "eval"} or (
                    called == "eval" and isinstance(node.func, ast.Attribute)  # Module.eval
                )
