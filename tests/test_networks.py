"""Sections 13-17: tokenizer, positions, attention, initialisation, optimizer groups, what networks see."""

import math

import pytest
import torch
from conftest import V, plain_config, random_batch, small_config
from training import new_model, train_steps, watch

ALL_ON = dict(lambda_supcon=0.5, outcome_queue=16, flow_context_grad=0.5)


def labelled(batch, cfg):
    """The batch with one maneuver for all clips, so that supervised contrast has positives."""
    batch["maneuver"] = torch.zeros_like(batch["maneuver"])
    return batch


# -- tokenizer and shapes


@pytest.mark.parametrize("image_size", [32, (16, 40)])
def test_tokenizer_is_conv3d(image_size):
    """The matrix product over cut-out tubelets is the convolution. Seen red with the permutation's h and w swapped."""
    cfg = small_config(image_size=image_size)
    tokenizer = V.Tokenizer(cfg)
    torch.nn.init.normal_(tokenizer.proj.bias)
    clip = torch.randn(2, cfg.num_frames, 3, cfg.height, cfg.width)
    weight, bias = tokenizer.proj.weight.double(), tokenizer.proj.bias.double()
    volume = torch.nn.functional.conv3d(clip.transpose(1, 2).double(), weight, bias, stride=weight.shape[2:])
    reference = volume.flatten(2).transpose(1, 2)
    assert volume.shape[2:] == cfg.grid
    # fp32 dot products of 384 terms of size 0.02: rounding is below 1e-6
    torch.testing.assert_close(tokenizer(clip).double(), reference, rtol=1e-4, atol=1e-5)


def test_token_order_is_t_h_w():
    """One lit tubelet changes exactly the token at (t * h + row) * w + column."""
    cfg = small_config(image_size=(16, 40))
    tokenizer = V.Tokenizer(cfg)
    t, h, w = cfg.grid
    dark = torch.zeros(1, cfg.num_frames, 3, cfg.height, cfg.width)
    for place, row, column in [(0, 0, 0), (3, 1, 2), (5, 0, 4), (5, 1, 4)]:
        clip = dark.clone()
        frames = slice(place * cfg.tubelet_t, (place + 1) * cfg.tubelet_t)
        clip[:, frames, :, row * cfg.patch : (row + 1) * cfg.patch, column * cfg.patch : (column + 1) * cfg.patch] = 1
        changed = (tokenizer(clip) - tokenizer(dark)).abs().sum(2)[0].nonzero().flatten().tolist()
        assert changed == [(place * h + row) * w + column]
        assert V.grid_positions(cfg.grid)[changed[0]].tolist() == [place, row, column]
    assert cfg.num_tokens == t * h * w == len(V.grid_positions(cfg.grid))


@pytest.mark.parametrize("pos_embed", ["sincos", "rope"])
@pytest.mark.parametrize("image_size", [32, (16, 40)])
def test_shapes_of_a_forward_pass(pos_embed, image_size):
    """Every network has the documented shapes, square or not, with both position codes; all losses are finite."""
    cfg = plain_config(image_size=image_size, pos_embed=pos_embed, mask_draws=2, **ALL_ON)
    V.validate_config(cfg)
    model, B, D = new_model(cfg), 3, cfg.enc_dim
    batch = labelled(random_batch(cfg, B), cfg)
    losses, gauges, carry, seen = watch(model, batch)
    assert cfg.num_tokens == 6 * (cfg.height // 8) * (cfg.width // 8)
    assert carry["targets"].shape == (B, cfg.num_tokens, D) and carry["key"].shape == (B, D)
    assert len(seen["predictor"]) == 5 and [args[3] for args, _ in seen["predictor"]] == [0, 0, 1, 1, 2]
    for (context, keep_idx, mask_idx, family), preds in seen["predictor"]:
        assert context.shape == (B, keep_idx.shape[1], D) and preds.shape == (B, mask_idx.shape[1], D)
        if family != V.SOON:
            both = torch.cat([keep_idx, mask_idx], 1).sort(1).values
            assert torch.equal(both, torch.arange(cfg.num_tokens).expand(B, -1))
    _, keep_idx, mask_idx, _ = seen["predictor"][-1][0]
    assert keep_idx[0].tolist() == list(range(cfg.now_tokens))
    assert mask_idx[0].tolist() == list(range(cfg.now_tokens, cfg.now_tokens + cfg.soon_tokens))
    assert seen["outcome"][0][1].shape == (B, D)
    assert seen["flow"][0][1].shape == (B, cfg.flow_draws, 1, cfg.flow_rank)
    assert set(losses) == {"loss_total", "loss_vjepa", "loss_soon", "loss_eventually", "loss_flow", "loss_supcon"}
    assert all(torch.isfinite(value) and value.ndim == 0 for value in (*losses.values(), *gauges.values()))
    assert model.online(model.normalise(batch["frames"])).shape == (B, cfg.num_tokens, D)


# -- position codes


def sincos_by_hand(position, dim):
    """The row of one (t, h, w) position in Python floats: per axis all sines, then all cosines; zeros at the end."""
    half = dim // 6
    row = []
    for coordinate in position:
        angles = [coordinate / 10000 ** (i / half) for i in range(half)]
        row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return row + [0.0] * (dim - len(row))


@pytest.mark.parametrize("dim", [24, 48, 50, 128])
def test_sincos_table_by_hand(dim):
    """Seen red with base 1000."""
    positions = V.grid_positions((6, 4, 5))
    table = V.sincos_table(positions, dim)
    reference = torch.tensor([sincos_by_hand(position, dim) for position in positions.tolist()], dtype=torch.float64)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), reference, rtol=0, atol=1e-7)  # one rounding to fp32 of numbers up to 1


@pytest.mark.parametrize("grid, dim", [((42, 14, 14), 768), ((42, 14, 14), 384), ((6, 4, 4), 24)])
def test_sincos_rows_are_distinct(grid, dim):
    """No two tokens share a code, in encoder and predictor at the defaults and in the small config."""
    table = V.sincos_table(V.grid_positions(grid), dim)
    # 1e-3 steps: rows that differ by less would be the same code to a network
    assert len(torch.unique((table * 1e3).round(), dim=0)) == math.prod(grid)


def rope_by_hand(vector, position, head_dim):
    """The published V-JEPA 2 rotation of one head vector: axes repeat their frequency list, neighbours are turned."""
    part = 2 * (head_dim // 3 // 2)
    out = list(vector)
    for axis, coordinate in enumerate(position):
        omega = [10000 ** (-i / (part / 2)) for i in range(part // 2)] * 2
        for pair in range(part // 2):
            first = axis * part + 2 * pair
            a, b = coordinate * omega[2 * pair], coordinate * omega[2 * pair + 1]
            out[first] = vector[first] * math.cos(a) - vector[first + 1] * math.sin(a)
            out[first + 1] = vector[first + 1] * math.cos(b) + vector[first] * math.sin(b)
    return out


@pytest.mark.parametrize("head_dim", [6, 12, 32, 64])
def test_rope_by_hand(head_dim):
    """Seen red with repeat_interleave in place of repeat (head_dim 12 and above)."""
    positions = V.grid_positions((3, 2, 4))
    cos, sin = V.rope_table(positions, head_dim)
    x = torch.randn(1, 1, len(positions), head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = torch.tensor(
        [rope_by_hand(v, p, head_dim) for v, p in zip(x[0, 0].tolist(), positions.tolist())], dtype=torch.float64
    )
    torch.testing.assert_close(V.rotate(x, cos, sin)[0, 0], reference, rtol=0, atol=1e-6)  # the tables are fp32


def test_rope_is_a_rotation_with_one_frequency_per_axis():
    """At 6 channels per head the two angles of a pair agree: norms are kept and scores depend on differences alone.

    With more frequencies the published form turns the two channels of a pair by different angles and has neither
    property; test_rope_by_hand covers it."""
    head_dim, generator = 6, torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, head_dim, dtype=torch.float64, generator=generator)
    grid = V.grid_positions((4, 4, 4))
    shifted = grid + torch.tensor([3, 1, 2])
    turned_q, turned_k, far_q, far_k = (
        V.rotate(vector.expand(1, 1, 64, head_dim), *V.rope_table(positions, head_dim))[0, 0]
        for positions in (grid, shifted)
        for vector in (q, k)
    )
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(64), rtol=0, atol=1e-6)  # fp32 tables
    torch.testing.assert_close(turned_q @ turned_k.T, far_q @ far_k.T, rtol=0, atol=1e-5)
    assert (turned_q @ turned_k.T).std() > 0.1  # and positions do matter


@pytest.mark.parametrize("pos_embed", ["sincos", "rope"])
def test_positions_follow_keep_idx(pos_embed):
    """A token has the same position whichever others are kept. Seen red with the code of the first K places added."""
    cfg = small_config(pos_embed=pos_embed)
    encoder, L = V.Encoder(cfg), cfg.num_tokens
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(encoder.trunk.blocks[0].attn.qkv.weight, std=0.3)  # attention that is far from uniform
    pieces = torch.randn(2, L, 3 * cfg.tubelet_t * cfg.patch**2)
    order = torch.stack([torch.randperm(L, generator=generator) for _ in range(2)])
    full = encoder.encode(pieces, torch.arange(L).expand(2, -1))
    # the order of tokens changes the summation order of attention only
    torch.testing.assert_close(encoder.encode(pieces, order), V.gather_tokens(full, order), rtol=1e-4, atol=1e-5)
    moved = encoder.encode(pieces.roll(1, 1), torch.arange(L).expand(2, -1)).roll(-1, 1)
    assert (moved - full).abs().max() > 1e-2


def test_kept_tokens_carry_their_own_code():
    """Without mixing between tokens, encoding a subset is a subset of encoding the whole clip."""
    cfg = small_config()
    encoder = V.Encoder(cfg)
    for block in encoder.trunk.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    clip = torch.randn(2, cfg.num_frames, 3, cfg.height, cfg.width)
    keep_idx = torch.tensor([[0, 5, 17, 95], [3, 40, 41, 94]])
    part = encoder.encode(encoder.tokenizer.cut(clip), keep_idx)
    torch.testing.assert_close(
        part, V.gather_tokens(encoder(clip), keep_idx), rtol=0, atol=1e-5
    )  # fp32 products of other sizes


# -- attention


def softmax_attention(q, k, v):
    """One head in plain formulas: q [N, hd], k and v [K, hd] -> [N, hd]."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    weights = torch.exp(scores - scores.max(1, keepdim=True).values)
    return weights / weights.sum(1, keepdim=True) @ v


@pytest.mark.parametrize("with_rope", [False, True])
def test_attention_by_hand(with_rope):
    """Self-attention in float64 against explicit heads. Seen red with a scale of 1 / head_dim in attention."""
    dim, heads, N, hd = 24, 2, 7, 12
    torch.manual_seed(0)
    attention = V.Attention(dim, heads, 0.0).double()
    x = torch.randn(2, N, dim, dtype=torch.float64)
    positions = V.grid_positions((7, 1, 1))
    cos, sin = V.rope_table(positions, hd)
    out = attention(
        x, (cos[None, None].expand(2, 1, -1, -1), sin[None, None].expand(2, 1, -1, -1)) if with_rope else None
    )
    parts = (x @ attention.qkv.weight.T + attention.qkv.bias).split(dim, 2)
    for b in range(2):
        joined = []
        for head in range(heads):
            q, k, v = (part[b, :, head * hd : (head + 1) * hd] for part in parts)
            if with_rope:
                q, k = (
                    torch.tensor(
                        [rope_by_hand(row, p, hd) for row, p in zip(y.tolist(), positions.tolist())], dtype=x.dtype
                    )
                    for y in (q, k)
                )
            joined.append(softmax_attention(q, k, v))
        reference = torch.cat(joined, 1) @ attention.proj.weight.T + attention.proj.bias
        torch.testing.assert_close(out[b], reference, rtol=0, atol=1e-6 if with_rope else 1e-12)  # rope tables are fp32


def test_cross_attention_by_hand():
    """Queries of one width read a context of another, in float64."""
    dim, context_dim, heads = 24, 18, 3
    torch.manual_seed(0)
    cross = V.CrossAttention(dim, context_dim, heads).double()
    x, context = torch.randn(1, 5, dim, dtype=torch.float64), torch.randn(1, 9, context_dim, dtype=torch.float64)
    out = cross(x, *cross.project(context))[0]
    q = x[0] @ cross.q.weight.T + cross.q.bias
    k, v = (context[0] @ cross.kv.weight.T + cross.kv.bias).split(dim, 1)
    joined = torch.cat([softmax_attention(*(y[:, i * 8 : (i + 1) * 8] for y in (q, k, v))) for i in range(heads)], 1)
    torch.testing.assert_close(out, joined @ cross.proj.weight.T + cross.proj.bias, rtol=0, atol=1e-12)


def attention_grads(attend, parts, upstream):
    """Output and gradients of one attention call -> list of tensors in float64."""
    leaves = [part.clone().requires_grad_() for part in parts]
    out = attend(*leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]


@pytest.mark.parametrize("num_queries, num_keys", [(30, 30), (7, 64)])
def test_plain_products_equal_the_fused_attention(monkeypatch, num_queries, num_keys):
    """Where gradients in bf16 take the plain path, output and gradients are as close to float64 as bf16 allows.

    Seen red with a scale of 1 / head_dim, and with the softmax over queries in the script.
    """
    torch.manual_seed(0)
    parts = [2 * torch.randn(3, 2, num, 16) for num in (num_queries, num_keys, num_keys)]
    upstream = torch.randn(3, 2, num_queries, 16)
    exact = attention_grads(
        torch.nn.functional.scaled_dot_product_attention, [part.double() for part in parts], upstream
    )
    monkeypatch.setattr(V.F, "scaled_dot_product_attention", None)  # the plain path does not call it
    plain = attention_grads(V.attend, [part.bfloat16() for part in parts], upstream)
    for value, reference in zip(plain, exact):
        assert (
            float((value - reference).norm() / reference.norm()) < 0.03
        )  # bf16 keeps 8 bits, twice rounded on the way


@pytest.mark.parametrize("per_call", [1, 2, 10])
def test_plain_products_without_gradients_come_in_parts(monkeypatch, per_call):
    """As many clips at a time as the cache holds: close to float64, and to what all at once give."""
    torch.manual_seed(0)
    parts = [2 * torch.randn(5, 2, num, 16) for num in (7, 30, 30)]
    exact = torch.nn.functional.scaled_dot_product_attention(*(part.double() for part in parts))
    monkeypatch.setattr(V, "plain_is_faster", lambda: True)
    monkeypatch.setattr(V, "NEAR_SCORES", per_call * 2 * 7 * 30 + 1)
    monkeypatch.setattr(V.F, "scaled_dot_product_attention", None)
    calls, plain = [], V.attend_plainly
    monkeypatch.setattr(V, "attend_plainly", lambda *part: calls.append(len(part[0])) or plain(*part))
    parts = [part.bfloat16() for part in parts]
    with torch.no_grad():
        out = V.attend(*parts)
    assert calls == {1: [1] * 5, 2: [2, 2, 1], 10: [5]}[per_call]
    assert float((out.double() - exact).norm() / exact.norm()) < 0.03
    torch.testing.assert_close(out, plain(*parts), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("case", ["fp32", "other CPU", "far scores", "many scores"])
def test_other_attention_is_fused(monkeypatch, case):
    """Full precision, long sequences and inference on other CPUs keep the kernel, bit for bit: no scores."""
    parts = [
        torch.randn(2, 2, 9, 8, dtype=torch.float32 if case == "fp32" else torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    monkeypatch.setattr(V, "plain_is_faster", lambda: case != "other CPU")
    limit, most = ("MAX_PLAIN_SCORES", 2 * 2 * 9 * 9) if case == "many scores" else ("NEAR_SCORES", 2 * 9 * 9)
    if case.endswith("scores"):
        monkeypatch.setattr(V, limit, most - 1)
    with torch.set_grad_enabled(case in ("fp32", "many scores")):
        out, reference = V.attend(*parts), torch.nn.functional.scaled_dot_product_attention(*parts)
        assert torch.equal(out, reference)
        if case.endswith("scores"):
            monkeypatch.setattr(V, limit, most)
            assert not torch.equal(V.attend(*parts), reference)  # one score fewer and it is the plain path


@pytest.mark.parametrize("bf16, tiles", [(False, False), (True, False), (True, True)])
def test_only_the_kind_of_cpu_that_was_timed_leaves_the_kernel(monkeypatch, bf16, tiles):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert V.plain_is_faster() == (bf16 and not tiles)


# -- initialisation and optimizer groups


def test_initialisation_rules():
    """Std 0.02, in the flow net 1 / sqrt(inputs), two last matrices of block n by 1 / sqrt(2 n), biases 0, norms 1.

    Seen red with the division by sqrt(2 n) removed.
    """
    cfg = small_config(enc_dim=96, pred_dim=48, enc_depth=3, flow_dim=64)
    model = new_model(cfg)
    zeroed = ("modulate.weight", "flow.out.weight")
    for name, parameter in model.named_parameters():
        if name.startswith(("target.", "flow_ema.")):
            continue
        if name.endswith(zeroed) or name.endswith("bias"):
            assert not parameter.any(), name
            continue
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        expected = parameter.shape[1] ** -0.5 if name.startswith("flow.") else 0.02
        parts = name.split(".")
        if "trunk" in parts and name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            expected /= math.sqrt(2 * (int(parts[parts.index("blocks") + 1]) + 1))
        # the standard error of a deviation is 1 / sqrt(2 n) of it; five of them
        assert abs(float(parameter.detach().std()) / expected - 1) < 5 / math.sqrt(2 * parameter.numel()), name
    for copy, original in ((model.target, model.online), (model.flow_ema, model.flow)):
        assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), original.parameters()))


def test_every_parameter_in_exactly_one_group():
    """Trained parameters stand in one group each, frozen copies in none, and only matrices decay.

    Seen red with the test on `queries` removed from parameter_groups.
    """
    cfg = small_config(**ALL_ON)
    model = new_model(cfg)
    groups = model.optimizer().param_groups
    owner = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in owner
            owner[id(parameter)] = group
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(owner) == set(names)
    assert not any(name.startswith(("target.", "flow_ema.")) for name in names.values())
    for key, name in names.items():
        group = owner[key]
        if name.startswith(("flow.", "read_out.")):
            assert group["weight_decay"] == 0 and group["peak_lr"] == cfg.flow_lr, name
            continue
        plain = name.endswith("bias") or "norm" in name or name in ("predictor.mask_tokens", "outcome.queries")
        assert group["weight_decay"] == (0 if plain else cfg.weight_decay) and group["peak_lr"] == cfg.lr, name


def test_every_parameter_gets_a_gradient():
    """One step gives every trained parameter a gradient (DDP needs that), and soon each of them is non-zero.

    The flow net starts as the identity, so its inner gradients are zero for the first steps.
    """
    cfg = small_config(lr=1e-3, flow_lr=1e-2, **ALL_ON)
    model, batch = new_model(cfg), labelled(random_batch(cfg, 4), cfg)
    model(batch)[0]["loss_total"].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    model.zero_grad(set_to_none=True)
    train_steps(model, lambda step: [batch], 6)
    model(batch)[0]["loss_total"].backward()
    assert [name for name, p in trained.items() if not p.grad.any()] == []


@pytest.mark.parametrize(
    "off",
    [
        ("lambda_flow",),
        ("lambda_eventually",),
        ("lambda_soon",),
        ("lambda_vjepa",),
        ("lambda_vjepa", "lambda_soon"),
        ("lambda_vjepa", "lambda_soon", "lambda_flow"),
        ("lambda_eventually", "lambda_flow"),
    ],
)
def test_no_parameter_without_gradient_when_losses_are_off(off):
    """What a switched-off loss leaves untrained is frozen: DDP would wait for its gradient for ever."""
    cfg = small_config(**dict.fromkeys(off, 0.0))
    V.validate_config(cfg)
    model = new_model(cfg)
    model(random_batch(cfg, 2))[0]["loss_total"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_grad_checkpoint_changes_nothing(dropout):
    """Recomputed activations give the same losses and gradients, with dropout too."""
    results = []
    for grad_checkpoint in (False, True):
        cfg = small_config(grad_checkpoint=grad_checkpoint, dropout=dropout)
        model = new_model(cfg)
        torch.manual_seed(1)
        losses, _, _ = model(random_batch(cfg, 2))
        losses["loss_total"].backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (losses, grads), (losses_again, grads_again) = results
    for name in losses:
        assert torch.equal(losses[name], losses_again[name])
    for name in grads:
        torch.testing.assert_close(
            grads_again[name], grads[name], rtol=1e-5, atol=1e-8
        )  # sums may be ordered differently


# -- what may be seen


def pixels_of(cfg, idx):
    """Token ids [M] -> bool [T, 1, H, W], True on the pixels of those tokens."""
    t, h, w = cfg.grid
    lit = torch.zeros(t * h * w, dtype=torch.bool)
    lit[idx] = True
    lit = lit.view(t, h, w)
    for axis, size in enumerate((cfg.tubelet_t, cfg.patch, cfg.patch)):
        lit = lit.repeat_interleave(size, axis)
    return lit[:, None]


@pytest.mark.parametrize("pos_embed", ["sincos", "rope"])
@pytest.mark.parametrize("family", [0, 1])
def test_context_ignores_hidden_pixels(family, pos_embed):
    """Other pixels under the mask leave the context bit-identical; other visible ones do not.

    Seen red with one hidden token added to keep_idx.
    """
    cfg = plain_config(pos_embed=pos_embed, image_size=(32, 48))
    model, batch = new_model(cfg), random_batch(cfg, 2)
    before = watch(model, batch)[3]["predictor"][family][0]
    assert before[3] == family
    for idx, same in ((before[2], True), (before[1], False)):
        changed = dict(batch, frames=batch["frames"].clone())
        for b in range(2):
            area = pixels_of(cfg, idx[b]).expand_as(changed["frames"][b])
            changed["frames"][b][area] = 255 - changed["frames"][b][area]
        after = watch(model, changed)[3]["predictor"][family][0]
        assert torch.equal(before[0], after[0]) == same


@pytest.mark.parametrize("pos_embed", ["sincos", "rope"])
def test_now_context_ignores_the_future(pos_embed):
    """Everything that forecasts (SOON, outcome, read-out, flow) reads the same bits when all future pixels change.

    Seen red with now_idx one token longer.
    """
    cfg = small_config(pos_embed=pos_embed)
    model, batch = new_model(cfg), random_batch(cfg, 2)
    changed = dict(batch, frames=batch["frames"].clone())
    changed["frames"][:, cfg.now_frames :] = 255 - changed["frames"][:, cfg.now_frames :]
    _, _, carry, seen = watch(model, batch)
    _, _, carry_after, seen_after = watch(model, changed)
    (context, keep_idx, _, family), preds = seen["predictor"][-1]
    (context_after, _, _, _), preds_after = seen_after["predictor"][-1]
    assert family == V.SOON and keep_idx.max() == cfg.now_tokens - 1
    assert torch.equal(context, context_after) and torch.equal(preds, preds_after)
    assert torch.equal(seen["outcome"][0][0][0], seen_after["outcome"][0][0][0])
    (summary, _), (summary_after, _) = seen["flow"][0][0][2], seen_after["flow"][0][0][2]
    assert torch.equal(summary, summary_after)
    assert not torch.equal(carry["targets"], carry_after["targets"])
    past = dict(batch, frames=batch["frames"].clone())
    past["frames"][:, cfg.now_frames - 1] = 255 - past["frames"][:, cfg.now_frames - 1]
    assert not torch.equal(watch(model, past)[3]["outcome"][0][0][0], context)


def test_target_is_frozen_and_in_eval_mode():
    """No gradient reaches the target encoder or the flow EMA, and train() never switches their dropout on.

    Seen red with WorldModel.train removed.
    """
    cfg = small_config(dropout=0.3, **ALL_ON)
    model, batch = new_model(cfg), random_batch(cfg, 2)
    model.eval().train()
    for module in (model.target, model.flow_ema):
        assert not any(child.training for child in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
    assert model.online.training and model.predictor.training
    losses, _, carry = model(batch)
    losses["loss_total"].backward()
    assert all(p.grad is None for module in (model.target, model.flow_ema) for p in module.parameters())
    assert not carry["targets"].requires_grad
    assert torch.equal(carry["targets"], model(batch)[2]["targets"])  # dropout 0.3 would show here
