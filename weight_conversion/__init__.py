"""Weights between InternEvo training checkpoints and Hugging Face folders, both ways, exactly.

What flows through, for either direction:

    folder --reader--> StoredTensors --Table--> Moves --copy engine--> files laid out by a writer --publish--> folder

    folders/    internevo_folder   which shards there are, pipeline stages renumbered, model_config.pt
                grid, numbering    which file belongs to which ranks; how stages number their layers
                hf_folder          index, shards, config.json and the small files beside them
                sources            what --src is, and what to give instead
                model_folder       what --force may replace
    files/      torch_file         one .pt / .bin file          safetensors_file   one .safetensors file
                plain_pickle       the pickle in a .pt file, of which nothing is run
                checksums          of the records in it
                views, dtypes      tensors as places in files, windows on them, and the types of their elements
                moves, runs        which windows hold the same elements; what of a pair lies in a block
                copying, casting   moves bytes between files in blocks, and casts them; knows no names and no formats
                open_files, kinds  reads and writes for several threads, the disk at work meanwhile; no devices or FIFOs
                stamps             whether files are what they were when they were first read
    mapping/    table, rules       which tensor becomes which, and how its parts lie in it
                internlm, internlm2, llama     the rows of each; families lists what can be converted
                rows, choices      the rows that all share; what checkpoints leave open (isp), and what one chose
                family, form       what a family is; what each of its Hugging Face folders is
                sizes              a model's sizes from its settings and tensors
                matching           the tensors found, set against the table
                hf_settings        config.json in the words of training, and the other way round
                training_settings  what model_config.pt may say
    tokenizer/  tokenizer_files    tokenizer.model to the tokenizer's files: sentencepiece_model reads it,
                                   tokenizer_json makes the fast form, chat_templates the template
                specs, prepared    what is said of each family's; what a conversion gets of one
    running/    convert, revert    the two directions, as the scripts call them
                meanwhile          what another process does meanwhile: the tokenizer's files
                understanding      a training checkpoint as its family reads it, for both
                publishing         a hidden folder beside the target that becomes the target when it is complete
                reporting          progress, warnings and the last line
    command_line                   the flags of the four scripts, and their exit status
    errors, signals, printing      the sentence that stops a run, the signals that do, and what stops none
"""

__version__ = "1.2.0"
"""The project's: pyproject.toml and the scripts take it from here, the converters write it into config.json, and the
modules that they copy beside the weights state the same."""

PROJECT = "internevo-hf-bridge"
