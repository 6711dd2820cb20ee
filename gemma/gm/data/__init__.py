# SPDX-License-Identifier: Apache-2.0
"""Data for training: examples out of files and plain text, as numpy arrays. No framework is loaded by it.

    examples = gm.data.read_examples("chats.jsonl")
    loader = gm.data.Loader(examples, tokenizer, batch_size=8, max_length=512, packing=True)
    print(loader.report)
    for batch in loader: ...                # tokens, targets, loss_mask, positions, segment_ids

Decoder inputs and labels of an encoder-decoder are made in `gemma/seq2seq.py`.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_encode": ["EncodedExample", "encode"],
        "_examples": [
            "BadRow",
            "Completion",
            "Conversation",
            "Examples",
            "Labelled",
            "Preference",
            "Rated",
            "Text",
        ],
        "_functional": ["Seq2SeqFields", "make_seq2seq_fields", "pad"],
        "_loader": ["BatchIterator", "Loader"],
        "_parquet": ["Parquet"],
        "_read": ["read_examples"],
        "_report": ["DataReport"],
        "_span_corruption": ["Denoiser", "PrefixLMTask", "SpanCorruptionTask", "UL2Task", "UL2_DENOISERS"],
        "_tasks": ["ContrastiveTask", "Seq2SeqTask"],
        "_transforms": ["AddSeq2SeqFields", "DecodeBytes", "FormatText", "MapInts", "Pad", "Tokenize"],
    },
    variants=("kauldron", "gemma.gm._kauldron", ["Parquet"]),
)
