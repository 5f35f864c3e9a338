"""Make `tests/tiny_gemma3`: a random Gemma 3 of the real geometry in about 1 MB.

    python tests/make_tiny_gemma3.py [DIRECTORY]

896x896 pixels in patches of 14 give the real 4096 patches and 256 soft tokens, the special tokens
and the form of the chat template are Gemma's; only widths, depth and vocabulary are small. Weights
are drawn from a fixed seed, so every run writes the same model.
"""

import sys
from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GemmaTokenizer,
    GenerationConfig,
)

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
    token_id = tokenizer.convert_tokens_to_ids
    return Gemma3Config(
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
        mm_tokens_per_image=256,
        image_token_index=token_id("<image_soft_token>"),
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
        eos_token_id=[token_id("<eos>"), token_id("<end_of_turn>")],
        bos_token_id=token_id("<bos>"),
        pad_token_id=token_id("<pad>"),
    )


@torch.no_grad()
def make_model(config: Gemma3Config, seed: int = 61) -> Gemma3ForConditionalGeneration:
    """Weights wide enough that image and question both reach the answer.

    The seed and the weight of `<end_of_turn>` were chosen so that answers differ in length.
    """
    model = Gemma3ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        width = weight[0].numel() if weight.dim() > 1 else 25.0
        weight.normal_(std=1.5 / width**0.5, generator=generator)
        if name.endswith("embed_tokens.weight"):
            weight.mul_(0.2)
            weight[: len(SPECIAL_TOKENS)] *= 0.3
            weight[config.eos_token_id[-1]] *= 9.0
    model.generation_config = GenerationConfig(
        do_sample=True,  # like the released checkpoints
        top_k=64,
        top_p=0.95,
        eos_token_id=config.eos_token_id,
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model.to(torch.bfloat16)


def main(directory: Path) -> None:
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    image_processor = Gemma3ImageProcessorPil(
        size={"height": 896, "width": 896}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    Gemma3Processor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(
        directory
    )
    make_model(config).save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "tiny_gemma3"))
