"""Wrote the folders beside it with megatron-core 0.16.1's own GPTModel and dist_checkpointing, on a CPU.

    pip install torch==2.13.0 megatron-core==0.16.1 psutil numpy            # in an environment of its own
    camelid convert source ranks --to megatron --tensor-parallel 2 --pipeline-parallel 2
    python write.py ranks tp2_pp2 2 2
    camelid convert source_tied ranks --to megatron --tensor-parallel 2
    python write.py ranks tied_tp2_optimizer 2 1 --optimizer
    camelid convert source ranks --to megatron --pipeline-parallel 4
    python write.py ranks pp4_one_by_one 1 4 --one-by-one

Rank files are loaded into the model, whose sharded_state_dict() names and cuts the tensors. `--optimizer` adds tensors
under the names of Adam's first moments.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank: int, options: argparse.Namespace) -> None:
    # megatron-core asks for a GPU where a CPU would do.
    torch.cuda.synchronize = lambda *about: None
    torch.cuda.current_device = lambda: "cpu"
    torch.set_num_threads(1)
    tensor, pipeline = options.tensor_parallel, options.pipeline_parallel
    rendezvous = f"file://{Path('rendezvous').absolute()}"
    dist.init_process_group("gloo", rank=rank, world_size=tensor * pipeline, init_method=rendezvous)

    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(tensor, pipeline)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    folder = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02}" + f"_{stage:03}" * (pipeline > 1)
    file = Path(options.ranks) / "iter_0000001" / folder / "model_optim_rng.pt"
    held = torch.load(file, weights_only=False)
    args = held["args"]
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        layernorm_epsilon=args.norm_epsilon,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        hetereogenous_dist_checkpoint=options.one_by_one,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=stage == 0,
        post_process=stage == pipeline - 1,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
    )
    model.load_state_dict(held["model"])
    tensors = model.sharded_state_dict()
    state = {"model": tensors, "args": args, "iteration": 1, "checkpoint_version": 3.0}
    if options.optimizer:
        state["optimizer"] = {
            name: replace(held, key=f"optimizer.state.exp_avg.{held.key}", data=torch.zeros_like(held.data))
            for name, held in tensors.items()
            if type(held) is ShardedTensor
        }
    os.makedirs(options.out, exist_ok=True)
    dist_checkpointing.save(state, options.out)
    dist.barrier()
    os._exit(0)  # some runs abort in the teardown of gloo


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("ranks")
    parser.add_argument("out")
    parser.add_argument("tensor_parallel", type=int)
    parser.add_argument("pipeline_parallel", type=int)
    parser.add_argument("--one-by-one", action="store_true", help="no layers stacked")
    parser.add_argument("--optimizer", action="store_true")
    options = parser.parse_args()
    mp.spawn(work, (options,), options.tensor_parallel * options.pipeline_parallel)
    Path("rendezvous").unlink(missing_ok=True)
