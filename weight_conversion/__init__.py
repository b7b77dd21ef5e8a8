"""Weights between InternEvo training checkpoints and Hugging Face folders, both ways, exactly.

What flows through, for either direction:

    folder --reader--> StoredTensors --Table--> Moves --copy engine--> files laid out by a writer --publish--> folder

    folders/    internevo_folder   which shards there are, pipeline stages renumbered, model_config.pt
                hf_folder          index, shards, config.json and the small files beside them
    files/      torch_file         one .pt / .bin file          safetensors_file   one .safetensors file
                views              tensors as places in files, and windows on them
                copying            moves bytes between files in blocks; knows neither names nor formats
                open_files         reads and writes for several threads, and the disk at work meanwhile
    mapping/    table, rules       which tensor becomes which, and how its parts lie in it
                matching           the tensors found, set against the table
                family             what a family is: internlm and internlm2, their table and configuration, both ways
    tokenizer/  tokenizer_files    tokenizer.model to the tokenizer's files: sentencepiece_model reads it,
                                   tokenizer_json makes the fast form
    running/    convert, revert    the two directions, as the scripts call them
                publishing         a hidden folder beside the target that becomes the target when it is complete
                reporting          progress, warnings and the last line
    command_line                   the flags of the four scripts, and their exit status
    errors, signals, printing      the sentence that stops a run, the signals that do, and what stops none
"""

__version__ = "1.2.0"
"""The project's: pyproject.toml and the scripts take it from here, the converters write it into config.json, and the
modules that they copy beside the weights state the same."""

PROJECT = "internevo-hf-bridge"
