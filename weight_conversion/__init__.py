"""Weights between InternEvo training checkpoints and Hugging Face folders, both ways, exactly.

What flows through, for either direction:

    folder --reader--> StoredTensors --Table--> Moves --copy engine--> files laid out by a writer --publish--> folder

    internevo_folder   which shards there are, pipeline stages renumbered, model_config.pt
    hf_folder          index, shards, config.json and the small files beside them
    torch_file         one .pt / .bin file          safetensors_file   one .safetensors file
    tokenizer_files    tokenizer.model to the tokenizer's files: sentencepiece_model reads it, tokenizer_json makes the
                       fast form
    table, rules       which tensor becomes which, and how its parts lie in it
    internlm, internlm2  the two families: their table and their configuration, both ways
    copying            moves bytes between files in blocks; knows neither names nor formats
    publishing         a hidden folder beside the target that becomes the target when it is complete
    convert, revert    the two directions, as the scripts call them
"""
