"""transformers' DeepSeek models run on a HuggingFace folder, their inner values under the names of `dsatrain probe`.

Stock .double() models still compute norms, softmax, router and rotary table in float32, 3e-6 away from the true
logits. `double_precision()` makes these steps float64; the code is otherwise run as installed.
The KL rows are formulas of ours over transformers' attention weights and index scores, which it has no loss for:
  KL_t = sum_s p log p - p log softmax(I)_s,  p = mean over heads of the attention weights, detached.
ReLUs make index scores that are exactly 0 and tie. torch.topk breaks ties as it likes, dsatrain by the lower index;
`ordered_topk` runs transformers with the latter rule, everything else being its own.
"""
import contextlib
import os
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import transformers.modeling_rope_utils as rope_utils
import transformers.models.deepseek_v3.modeling_deepseek_v3 as v3
import transformers.models.deepseek_v32.modeling_deepseek_v32 as v32
from transformers import AutoConfig, DeepseekV3ForCausalLM, DeepseekV32ForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def ordered_topk(x, k, dim=-1, largest=True, sorted=True):
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


@contextlib.contextmanager
def topk_replaced(by):
    stock, torch.Tensor.topk = torch.Tensor.topk, by
    try:
        yield
    finally:
        torch.Tensor.topk = stock


class WideTorch(types.ModuleType):
    """torch, whose float32 is float64."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def double_precision():
    modules, stock_float = (v3, v32, rope_utils), torch.Tensor.float
    for module in modules:
        module.torch = WideTorch("torch")
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = stock_float
        for module in modules:
            module.torch = torch


def load(folder, **settings):
    """The model of the folder in float32 and what from_pretrained says about its tensors."""
    kind = DeepseekV32ForCausalLM if AutoConfig.from_pretrained(folder).model_type == "deepseek_v32" else DeepseekV3ForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
                                output_loading_info=True, **settings)


def widened(model):
    """A float64 copy, built inside double_precision() so that its rotary table is float64 too."""
    wide = type(model)(model.config).double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return wide


def released_names(named):
    """transformers' fused expert tensors -> the released ones, expert by expert."""
    for name, value in named:
        stem, _, fused = name.rpartition(".")
        if fused == "gate_up_proj":
            half = value.shape[1] // 2
            for e in range(value.shape[0]):
                yield f"{stem}.{e}.gate_proj.weight", value[e, :half]
                yield f"{stem}.{e}.up_proj.weight", value[e, half:]
        elif fused == "down_proj" and value.dim() == 3:
            for e in range(value.shape[0]):
                yield f"{stem}.{e}.down_proj.weight", value[e]
        else:
            yield name, value


class Recording:
    """Hooks that keep what passes through the layers while a model runs."""

    def __init__(self, model):
        self.model, self.values, self.attention, self.indexer_inputs, self.hooks = model, {}, {}, {}, []
        add = self.hooks.append
        add(model.model.embed_tokens.register_forward_hook(lambda m, i, o: self.keep("hidden.0", o)))
        add(model.model.norm.register_forward_hook(lambda m, i, o: self.keep("final_norm", o)))
        for L, layer in enumerate(model.model.layers):
            add(layer.register_forward_hook(lambda m, i, o, L=L: self.keep(f"hidden.{L + 1}", o)))
            add(layer.self_attn.register_forward_hook(lambda m, i, o, L=L: self.attention.update({L: o[1].detach()})))
            if hasattr(layer.mlp, "gate"):
                add(layer.mlp.gate.register_forward_hook(lambda m, i, o, L=L: self.keep_routing(L, o)))
            if hasattr(layer.self_attn, "indexer"):
                add(layer.self_attn.indexer.register_forward_pre_hook(
                    lambda m, i, L=L: self.indexer_inputs.update({L: [self.detach(x) for x in i]})))

    @staticmethod
    def detach(x):
        return x.detach() if isinstance(x, torch.Tensor) else tuple(t.detach() for t in x)

    def keep(self, name, value):
        self.values[name] = value.detach()

    def keep_routing(self, L, outputs):
        experts, order = outputs[2].detach().sort(-1)
        self.keep(f"router.{L}.experts", experts)
        self.keep(f"router.{L}.weights", outputs[1].detach().gather(1, order))

    def scores(self, L):
        """Layer L's index scores with a graph to its indexer: transformers' own code, its scores caught at top-k."""
        caught = []
        indexer = self.model.model.layers[L].self_attn.indexer

        def catch(scores, *a, **k):
            caught.append(scores)
            return ordered_topk(scores, *a, **k)
        with topk_replaced(catch):
            type(indexer).forward.__wrapped__(indexer, *self.indexer_inputs[L])  # without its no_grad
        return caught[0]

    def indexer_losses(self, set_name, gradients):
        for L in self.indexer_inputs:
            scores, p = self.scores(L), self.attention[L].mean(1)
            B, T, _ = scores.shape
            causal = torch.ones(T, T, dtype=torch.bool).tril()
            scores = scores.masked_fill(~causal, float("-inf"))
            self.keep(f"indexer.{L}.scores", scores)
            chosen = ordered_topk(scores, min(self.model.config.index_topk, T)).indices
            mask = torch.zeros(B, T, T, dtype=torch.bool).scatter(-1, chosen, True) & causal
            self.keep(f"indexer.{L}.topk_mask", mask.to(torch.uint8))
            logs = torch.log_softmax(scores.masked_fill(~mask, float("-inf")), -1).masked_fill(~mask, 0.0)
            rows = (torch.xlogy(p, p) - p * logs).sum(-1)
            self.keep(f"{set_name}.{L}.rows", rows)
            if gradients:
                indexer = dict(self.model.model.layers[L].self_attn.indexer.named_parameters())
                for (name, _), g in zip(indexer.items(), torch.autograd.grad(rows.sum(), indexer.values())):
                    self.keep(f"{set_name}.{L}.grad.{name}", g)

    def close(self):
        for hook in self.hooks:
            hook.remove()


def run(model, ids, attention, gradients=False):
    """Everything `dsatrain probe` writes, of a model in any precision. Dense V3.2: every key is selected."""
    if attention == "sparse" and ids.shape[1] <= model.config.index_topk:
        raise AssertionError(f"{ids.shape[1]} tokens with top-k {model.config.index_topk} (nothing sparse is tested) lengthen them")
    if hasattr(model.config, "index_topk") and attention == "dense":
        for layer in model.model.layers:
            layer.self_attn.indexer.index_topk = model.config.index_topk = ids.shape[1]
    record = Recording(model)
    with topk_replaced(ordered_topk):
        out = model(input_ids=ids, use_cache=False)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    record.keep("logits", out.logits)
    record.keep("lm_loss", loss.reshape(1))
    record.indexer_losses("warmup" if attention == "dense" else "sparse", gradients)
    if gradients:
        model.zero_grad()
        loss.backward()
        found = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        record.values.update({"grad." + name: g for name, g in released_names(found)})
    record.close()
    return record.values


def multi_token_prediction(folder, model, ids, attention):
    """mtp.logits of a folder with one MTP layer: transformers' decoder layer between projections of ours
    (eh_proj over [norm of the next token's embedding ; norm of the model's output]). `model` is the main model."""
    from safetensors.torch import load_file
    n, eps = model.config.num_hidden_layers, model.config.rms_norm_eps
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = n + 1
    for kinds in ("mlp_layer_types", "layer_types"):
        if getattr(config, kinds, None):
            setattr(config, kinds, [*getattr(config, kinds), getattr(config, kinds)[-1]])
    deeper = widened(load(folder, config=config)[0])
    weights = {}
    for file in sorted(os.listdir(folder)):
        if file.endswith(".safetensors"):
            weights.update(load_file(os.path.join(folder, file)))
    w = {name.removeprefix(f"model.layers.{n}."): value.double() for name, value in weights.items()
         if name.startswith(f"model.layers.{n}.")}

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    with topk_replaced(ordered_topk):
        h = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    z = torch.cat([norm(model.model.embed_tokens(ids[:, 1:]), w["enorm.weight"]), norm(h, w["hnorm.weight"])], -1)
    z = z @ w["eh_proj.weight"].T
    T = z.shape[1]
    positions = torch.arange(T)[None]
    mask = torch.full((T, T), torch.finfo(z.dtype).min, dtype=z.dtype).triu(1)[None, None].expand(len(z), 1, T, T)
    block = deeper.model.layers[n]
    if hasattr(block.self_attn, "indexer") and attention == "dense":
        block.self_attn.indexer.index_topk = T
    with topk_replaced(ordered_topk):
        y = block(z, attention_mask=mask, position_ids=positions, position_embeddings=model.model.rotary_emb(z, positions))
    return norm(y, w["shared_head.norm.weight"]) @ model.lm_head.weight.T
