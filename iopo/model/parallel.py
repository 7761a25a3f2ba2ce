"""Spread a model over processes, and keep its trained parameters in fp32 while it computes in bf16.

Two ways, one interface (TrainModel):

- sharded: FSDP2, one group per decoder block and one for the rest; parameters, gradients and
  optimizer state are divided over the processes of a mesh, gradients after every micro-batch.
- replicated: every process holds the model; gradients are summed over the processes after the last
  micro-batch. For adapters, whose gradients are small, and for one process, where FSDP2 only copies
  (SmolLM2-135M on a CPU with AMX, 400 tokens: 2.8 s of CPU time a step with it, 2.0 s without).

Gradients are sums over micro-batches and processes, never means: the loss is already divided by the
number of quads in the step.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from iopo.model.activation_checkpointing import checkpointed

BUCKET_BYTES = 64 * 2**20  # of fp32 gradients per all-reduce


@dataclass
class TrainModel:
    """A model ready to train, and what the loop does to it around forward and backward.

    parameters: what the optimizer updates, by the model's parameter names; fp32 (fp64 in an fp64
        model); DTensors if sharded. This is the state to save.
    dtype: of the computation.
    copies: the model's own parameters where they compute in another dtype; empty if sharded.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype
    copies: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        return isinstance(self.model, FSDPModule)

    def set_sync(self, last: bool) -> None:
        """Before each micro-batch's forward: whether it is the step's last on this process.

        Shards get their sums after every micro-batch, because whole gradients would be 4 bytes a
        parameter; replicas of shards after the last.
        """
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_all_reduce(last)

    def empty_backward(self, batch: Any) -> None:
        """Take part in a micro-batch that only other processes have; adds zero to the gradients.

        Sharded models communicate inside forward and backward, so every process must run as many;
        `batch` is any small batch. Replicated models have nothing to do.
        """
        if self.sharded:
            (self.model(batch).sum() * 0.0).backward()

    def reduce_and_clip(self, max_norm: float) -> Tensor:
        """After the last backward: sum gradients over processes and scale them to max_norm.

        max_norm: > 0; inf measures only. Returns the norm before clipping, a float scalar on the
        device, the same on all processes; inf or nan if any gradient is not finite, and then the
        gradients are unusable and the step must not be applied.
        """
        for name, copy in self.copies.items():
            self.parameters[name].grad, copy.grad = copy.grad, None
        if not self.sharded and dist.is_initialized() and dist.get_world_size() > 1:
            sum_gradients(list(self.parameters.values()))
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), max_norm, norm)
        return norm

    def zero_grad(self) -> None:
        """After the optimizer's step: forget the gradients and refresh the computing copies."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the model compute with the parameters as they are now; also after loading a state.

        They are rounded into their computing copies. Of a sharded model, what a forward without
        backward has left gathered goes: FSDP2 keeps the root's group for a backward, and the next
        forward would compute with it.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        if self.copies:
            copies: list[Tensor] = list(self.copies.values())
            torch._foreach_copy_(copies, [self.parameters[name] for name in self.copies])


@dataclass(frozen=True)
class BlockOptions:
    """What happens to each decoder block.

    checkpoint_every: keep of every k-th block (0: of none) its input alone, and recompute the rest
        of its activations in backward.
    selective: of those blocks keep matrix products and attention too (activation_checkpointing.py).
    compile: torch.compile each block.
    """

    checkpoint_every: int = 0
    selective: bool = False
    compile: bool = False


def make_mesh(device_type: str, shard_processes: int | None = None) -> DeviceMesh:
    """A mesh over all processes: 1-D, or 2-D (replicate, shard) if groups of fewer hold a copy.

    shard_processes: processes that divide one copy of the model, neighbours in rank, as within a
        node; None for all. With 8 GPUs a node, 8 gives HSDP: only gradients cross nodes.
    """
    world = dist.get_world_size()
    shard = shard_processes or world
    assert world % shard == 0  # check_sharding
    if shard == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    sizes = (world // shard, shard)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard"))


def prepare(
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    mesh: DeviceMesh | None,
    offload: bool = False,
    block_options: BlockOptions = BlockOptions(),
) -> TrainModel:
    """Place, shard or replicate a model (changed in place) whose root's forward does all its work.

    dtype: of the computation. Parameters that train are kept in fp32 at least; adapters stay fp32
        and frozen parameters as they are.
    mesh: shard over it (make_mesh); None replicates on all processes of the default group.
    offload: keep sharded parameters and optimizer state in host memory.
    block_options: what is recomputed and compiled.
    Every process gets the weights of rank 0: on others the model may be on the meta device. A plan
    (device: meta) is one process's own.
    """
    several = dist.is_initialized() and dist.get_world_size() > 1
    broadcast = several and device.type != "meta"
    accum_dtype = dtype if torch.finfo(dtype).bits >= 32 else torch.float32
    _exact_embedding_gradient(language_model(model))
    wrap_blocks(model, block_options)
    if broadcast:
        _agree_on_tensors(model)
    if mesh is None:
        if broadcast:
            _receive(model, list(model.modules()), device)
        return _replicate(model, device, dtype, accum_dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(accum_dtype)
    _shard(model, mesh, dtype, accum_dtype, offload, device if broadcast else None)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return TrainModel(model, trained, dtype)


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers causal LM that `model` is or holds."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order: the modules that transformers says must not be split."""
    names = set(language_model(model)._no_split_modules or ())
    # FSDP2 changes the class of a module, so look at its bases too
    found = [m for m in model.modules() if names & {base.__name__ for base in type(m).__mro__}]
    if not found:
        raise ValueError(f"{type(language_model(model)).__name__}: found no decoder layers")
    return found


def wrap_blocks(model: nn.Module, options: BlockOptions) -> None:
    """Checkpoint and compile inside `forward`, so that FSDP's hooks stay outside of both."""
    width = language_model(model).config.get_text_config().hidden_size
    for index, block in enumerate(blocks(model)):
        forward = block.forward
        if options.checkpoint_every and index % options.checkpoint_every == 0:
            forward = checkpointed(forward, selective=options.selective, width=width)
        if options.compile:
            forward = torch.compile(forward, dynamic=True)
        block.forward = forward  # type: ignore[method-assign]


def _replicate(
    model: nn.Module, device: torch.device, dtype: torch.dtype, accum_dtype: torch.dtype
) -> TrainModel:
    # beside frozen weights the trained ones are adapters, which compute from fp32 themselves
    adapters = any(not p.requires_grad for p in model.parameters())
    model.to(device)
    parameters, copies = {}, {}
    for name, parameter in model.named_parameters():  # a tied weight comes once
        if not parameter.requires_grad:
            continue
        if adapters or parameter.dtype == dtype == accum_dtype:
            parameter.data = parameter.data.to(accum_dtype)
            parameters[name] = parameter
            continue
        parameters[name] = nn.Parameter(parameter.detach().to(accum_dtype, copy=True))
        parameter.data = parameter.data.to(dtype)
        # autograd then sums in fp32, over micro-batches and over the two uses of a tied weight
        parameter.grad_dtype = accum_dtype
        copies[name] = parameter
    return TrainModel(model, parameters, dtype, copies)


def _agree_on_tensors(model: nn.Module) -> None:
    """Give every tensor the dtype it has on rank 0: files may hold some in another than asked for.

    Raises ValueError if rank 0 has other tensors: its machine has another version of transformers.
    """
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    told: list[Any] = [{n: (t.shape, t.dtype) for n, t in tensors.items()}]
    dist.broadcast_object_list(told, src=0)
    differing = sorted(told[0].keys() ^ tensors.keys())
    differing += [n for n, t in tensors.items() if n in told[0] and told[0][n][0] != t.shape]
    if differing:
        raise ValueError(
            f"rank {dist.get_rank()} has other weights than rank 0, among them {differing[:3]}; "
            "install one version of transformers on all machines"
        )
    for name, tensor in tensors.items():
        tensor.data = tensor.data.to(told[0][name][1])


def _receive(model: nn.Module, modules: list[nn.Module], device: torch.device) -> None:
    """Place the modules' own tensors, with rank 0's values."""
    empty = False
    for module in modules:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            empty = True
            module.to_empty(device=device, recurse=False)
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in own:
            tensor.data = tensor.data.to(device)
            dist.broadcast(tensor.data, 0)
    if empty:  # to_empty makes new parameters, one for each use of a tied weight
        language_model(model).tie_weights()


def _shard(
    model: nn.Module,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    accum_dtype: torch.dtype,
    offload: bool,
    receive_on: torch.device | None,
) -> None:
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == accum_dtype else dtype,
            reduce_dtype=accum_dtype,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    blocked: set[nn.Module] = set()
    for block in blocks(model):
        if receive_on is not None:  # whole, for as long as it takes to keep a shard of it
            _receive(model, list(block.modules()), receive_on)
        blocked.update(block.modules())
        fully_shard(block, **options)
    if receive_on is not None:
        _receive(model, [m for m in model.modules() if m not in blocked], receive_on)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # the loss is divided already; gloo has no reduction with a factor
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _wide_root_gradients(model, accum_dtype)


def _wide_root_gradients(model: nn.Module, accum_dtype: torch.dtype) -> None:
    """Gradients of the root's own group (embedding, final norm, head) arrive in `accum_dtype`.

    A tied weight gets one gradient as embedding and one as head; autograd would add them in bf16.
    """
    blocked = {id(m) for block in blocks(model) for m in block.modules()}
    outside = [module for module in model.modules() if id(module) not in blocked]

    def widen(module: nn.Module, args: Any) -> None:
        # FSDP's hook ran before this one: these are the gathered parameters
        for owner in outside:
            for parameter in owner.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.grad_dtype = accum_dtype

    model.register_forward_pre_hook(widen)


class _Embedding(torch.autograd.Function):
    """Look rows up; sum their gradients in fp32. PyTorch's CPU kernel sums bf16 in bf16."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight_VD: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding = weight_VD.shape[0], padding
        return F.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        grad = grad.float() if torch.finfo(grad.dtype).bits < 32 else grad
        sums_VD = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.rows, ctx.padding, False)
        return None, sums_VD, None


def _exact_embedding_gradient(model: PreTrainedModel) -> None:
    """Replace the look-up of a plain nn.Embedding; subclasses (Gemma's) keep their own."""
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding:
        padding = -1 if embedding.padding_idx is None else embedding.padding_idx

        def look_up(input: Tensor) -> Tensor:
            return _Embedding.apply(input, embedding.weight, padding)

        embedding.forward = look_up  # type: ignore[method-assign]


@torch.no_grad()
def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """All-reduce(SUM) the gradients over the default group, in buckets of a fixed order.

    A parameter without a gradient counts as zero: this process may have had no micro-batch. Same
    order and same buckets on every process give the same bits on all of them, run after run.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    pending = []
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in pending:
        work.wait()
        pieces = zip(flat.split([grad.numel() for grad in bucket]), bucket, strict=True)
        torch._foreach_copy_(bucket, [piece.view_as(grad) for piece, grad in pieces])


def _buckets(grads: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for grad in grads:
        if not buckets or grad.nbytes > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(grad)
        room -= grad.nbytes
    return buckets
