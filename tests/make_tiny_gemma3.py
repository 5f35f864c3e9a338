"""Make `tests/tiny_gemma3`: a random Gemma 3 of the real geometry in about 1 MB.

    python tests/make_tiny_gemma3.py [DIRECTORY]
    python tests/make_tiny_gemma3.py --size 4b|12b|27b DIRECTORY

896x896 pixels in patches of 14 give the real 4096 patches and 256 soft tokens, the special tokens
and the form of the chat template are Gemma's; only widths, depth and vocabulary are small. Weights
are drawn from a fixed seed, so every run writes the same model.

With `--size` the weights have the names, shapes and number of the released model's, in shards of
5 GB (8.6, 24.4 or 54.9 GB in all; one shard is in memory at a time). So the memory and time of a
pass are those of the released model, and no licence is needed. The tokenizer is the tiny one, and
the answers mean nothing.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GemmaTokenizer,
    GenerationConfig,
)
from transformers.core_model_loading import revert_weight_conversion

TINY_DIR = Path(__file__).parent / "tiny_gemma3"
SHARD_SIZE = 5_000_000_000  # bytes, as the released models' shards
TEXT_SIZES = {  # what differs between the released models' text configs
    "4b": {
        "num_hidden_layers": 34,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "12b": {
        "num_hidden_layers": 48,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "27b": {
        "num_hidden_layers": 62,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
    },
}
SPECIAL_TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"),
    "<image_soft_token>",
]
WORDS = (
    "what which is are the a an of in on this that there how many shape color colour image does "
    "contain where who it no yes not red green blue black brown gray teal yellow circle rectangle "
    "triangle one two three left right above below user model picture shown can you see and or"
).split()
CHARACTERS = [chr(code) for code in range(33, 127)] + ["▁", "\n"]

CHAT_TEMPLATE = r"""{{ bos_token }}
{%- for message in messages -%}
    {{ '<start_of_turn>' + (message['role'] | replace('assistant', 'model')) + '\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {{ '<start_of_image>' if item['type'] == 'image' else item['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""


def make_tokenizer() -> GemmaTokenizer:
    """Byte-pair encoding with byte fallback and `▁` for the space, as Gemma's."""
    pieces = SPECIAL_TOKENS + [f"<0x{byte:02X}>" for byte in range(256)] + CHARACTERS
    merges = [("\n", "\n")]
    for word in WORDS:
        spelling = [*word, "▁"]  # Gemma splits after the space, so "what " is one piece
        for length in range(1, len(spelling)):
            merges.append(("".join(spelling[:length]), spelling[length]))
    merges = [*dict.fromkeys(merges), ("\n\n", "\n")]  # one token before the image, as in Gemma
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces + [a + b for a, b in merges]))}
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    return tokenizer


def make_config(tokenizer: GemmaTokenizer) -> Gemma3Config:
    """Eight layers of width 32; the window is shorter than a prompt, so that it matters."""
    return join_configs(
        tokenizer,
        text_config={
            "vocab_size": 64 * -(-len(tokenizer) // 64),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 264,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 896,
            "patch_size": 14,
        },
    )


def make_released_config(tokenizer: GemmaTokenizer, size: str) -> Gemma3Config:
    """The released model's own numbers, with the token ids of the tiny tokenizer."""
    return join_configs(
        tokenizer,
        text_config={
            **TEXT_SIZES[size],
            "vocab_size": 262_208,
            "sliding_window": 1024,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    )


def join_configs(tokenizer: GemmaTokenizer, text_config: dict, vision_config: dict) -> Gemma3Config:
    """The whole model's config: both parts, 256 soft tokens an image, and the tokenizer's ids."""
    token_id = tokenizer.convert_tokens_to_ids
    return Gemma3Config(
        text_config=text_config,
        vision_config=vision_config,
        mm_tokens_per_image=256,
        image_token_index=token_id("<image_soft_token>"),
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
        eos_token_id=[token_id("<eos>"), token_id("<end_of_turn>")],
        bos_token_id=token_id("<bos>"),
        pad_token_id=token_id("<pad>"),
    )


def make_generation_config(config: Gemma3Config) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,  # like the released checkpoints
        top_k=64,
        top_p=0.95,
        eos_token_id=config.eos_token_id,
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
    )


@torch.no_grad()
def draw_weight(
    name: str, weight: Tensor, config: Gemma3Config, generator: torch.Generator
) -> None:
    """Fill one weight with normal numbers, wide enough that image and question both reach the
    answer. Nothing overflows: with 62 layers of width 384 no state was above 50.

    The weight of `<end_of_turn>` was chosen so that answers differ in length.
    """
    width = weight[0].numel() if weight.dim() > 1 else 25.0
    weight.normal_(std=1.5 / width**0.5, generator=generator)
    if name.endswith("embed_tokens.weight"):
        weight.mul_(0.2)
        weight[: len(SPECIAL_TOKENS)] *= 0.3
        weight[config.eos_token_id[-1]] *= 9.0


def make_model(config: Gemma3Config, seed: int = 61) -> Gemma3ForConditionalGeneration:
    """The model in memory, in bfloat16. The seed was chosen so that answers differ in length."""
    model = Gemma3ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        draw_weight(name, weight, config, generator)
    model.generation_config = make_generation_config(config)
    return model.to(torch.bfloat16)


def make_meta_model(config: Gemma3Config) -> Gemma3ForConditionalGeneration:
    """The model without its numbers, for names and shapes; its config says bfloat16."""
    with torch.device("meta"):
        return Gemma3ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


def stored_weights(model: Gemma3ForConditionalGeneration) -> dict[str, Tensor]:
    """What `save_pretrained` would store, under the names in its files."""
    weights = model.state_dict()
    del weights["lm_head.weight"]  # the same tensor as the embedding's
    return revert_weight_conversion(model, weights)


def draw_shard(
    shapes: dict[str, torch.Size], config: Gemma3Config, vocab_size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random bfloat16 weights of these names and shapes."""
    shard = {}
    for name, shape in shapes.items():
        # Plain normal numbers: torch draws them straight into bfloat16, in 3.8 ns each on one core.
        # Random bits took 1.0 ns, but of the 11.3 ns that the 4B took in all, most is writing.
        weight = torch.empty(shape, dtype=torch.bfloat16)
        draw_weight(name, weight, config, generator)
        if name.endswith("embed_tokens.weight"):
            weight[vocab_size:] *= 0.1
        shard[name] = weight
    return shard


def write_shards(
    config: Gemma3Config,
    vocab_size: int,
    directory: Path,
    shard_size: int = SHARD_SIZE,
    seed: int = 61,
) -> None:
    """Write config and random weights as `save_pretrained` does, in shards of `shard_size` bytes,
    one of them in memory at a time. A tensor that is larger has a shard of its own.

    `vocab_size` is the tokenizer's: tokens beyond it have no text, and are never answered.
    """
    model = make_meta_model(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    make_generation_config(config).save_pretrained(directory)
    weights = stored_weights(model)
    split = split_torch_state_dict_into_shards(weights, max_shard_size=shard_size)
    generator = torch.Generator().manual_seed(seed)
    for file_name, names in split.filename_to_tensors.items():
        start = time.monotonic()
        shapes = {name: weights[name].shape for name in names}
        shard = draw_shard(shapes, config, vocab_size, generator)
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        del shard  # before the next one is drawn
        num_bytes = (directory / file_name).stat().st_size
        seconds = time.monotonic() - start
        print(f"{file_name}: {num_bytes / 1e9:.2f} GB in {seconds:.0f} s", file=sys.stderr)
    if not split.is_sharded:
        return
    index = {
        "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    index_path = directory / "model.safetensors.index.json"
    index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def main(directory: Path, size: str | None = None) -> None:
    """Write the tiny model, or a random one of a released model's size, into a directory."""
    tokenizer = make_tokenizer()
    image_processor = Gemma3ImageProcessorPil(
        size={"height": 896, "width": 896}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    Gemma3Processor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(
        directory
    )
    if size is None:
        make_model(make_config(tokenizer)).save_pretrained(directory)
    else:
        write_shards(make_released_config(tokenizer, size), len(tokenizer), directory)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=TEXT_SIZES, help="the released model whose size the weights have"
    )
    parser.add_argument("directory", type=Path, nargs="?", help=f"default: {TINY_DIR.name}")
    args = parser.parse_args()
    if args.size is None:
        args.directory = args.directory or TINY_DIR
    elif args.directory is None:
        parser.error("--size needs a directory")
    elif any(args.directory.glob("*.safetensors")):
        # Old weights beside a new index would be taken for the model by some programs.
        parser.error(f"{args.directory} holds weights already; expected a new directory")
    return args


if __name__ == "__main__":
    args = parse_args()
    main(args.directory, args.size)
