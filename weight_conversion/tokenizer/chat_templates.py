"""The chat templates of both families, in Jinja as transformers and the serving engines render it.

`{% generation %}` marks what the model writes, the answer and the end of its turn: transformers makes the mask of the
assistant's tokens from it, the text is the same with and without. llama.cpp's engine and minja skip the marker too;
an engine that knows nothing of it reports an unknown tag, and needs a template without the two words.

Content is text, or a list of text parts; an assistant's message with tool calls may have none. What a template cannot
write is refused: other roles, other parts, and in InternLM, which was never taught a format for them, tools.
"""

# text(message): the content of a message.
_TEXT = (
    "{% macro text(message) %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] is defined and message['content'] is iterable "
    "and message['content'] is not mapping %}"
    "{% for part in message['content'] %}"
    "{% if part is string %}{{ part }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('The parts of a content are text; found the type ' ~ part['type'] ~ '.') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% elif not message['tool_calls'] %}"
    "{{ raise_exception('The content of a message is text or a list of text parts; found neither in a message of the "
    "role ' ~ message['role'] ~ '.') }}"
    "{% endif %}"
    "{% endmacro %}"
)

#     <s><|System|>:{content}\n
#     <|User|>:{content}<eoh>\n
#     <|Bot|>:{content}<eoa>\n
INTERNLM_CHAT_TEMPLATE = (
    f"{_TEXT}{{{{ bos_token }}}}"
    "{% if tools %}{{ raise_exception('InternLM has no format for tools; InternLM2 has one.') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['tool_calls'] %}"
    "{{ raise_exception('InternLM has no format for tool calls; InternLM2 has one.') }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ '<|System|>:' + text(message) + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>:' + text(message) + '<eoh>\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|Bot|>:' }}{% generation %}{{ text(message) + '<eoa>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ raise_exception('The roles are system, user and assistant; found ' ~ message['role'] ~ '.') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Bot|>:' }}{% endif %}"
)

# plugins(tools): the functions as a JSON list, whether or not they come wrapped in {"type": "function"}.
_PLUGINS = (
    "{% macro plugins(tools) %}"
    "{{ '<|im_start|>system name=<|plugin|>\\n[' }}"
    "{% for tool in tools %}{% if not loop.first %}{{ ', ' }}{% endif %}"
    "{% if tool['function'] is mapping %}{{ tool['function'] | tojson }}{% else %}{{ tool | tojson }}{% endif %}"
    "{% endfor %}"
    "{{ ']<|im_end|>\\n' }}"
    "{% endmacro %}"
)

# calls(message): the tool calls of an assistant; their arguments may be JSON already.
_CALLS = (
    "{% macro calls(message) %}"
    "{% if message['tool_calls'] %}{% for tool_call in message['tool_calls'] %}"
    "{% if tool_call['function'] is mapping %}{% set function = tool_call['function'] %}"
    "{% else %}{% set function = tool_call %}{% endif %}"
    "{{ '<|action_start|><|plugin|>\\n{\"name\": ' + (function['name'] | tojson) + ', \"parameters\": ' }}"
    "{% if function['arguments'] is string %}{{ function['arguments'] }}"
    "{% else %}{{ function['arguments'] | tojson }}{% endif %}"
    "{{ '}<|action_end|>' }}"
    "{% endfor %}{% endif %}"
    "{% endmacro %}"
)

#     <s><|im_start|>{system or user}\n{content}<|im_end|>\n
#     <|im_start|>system name=<|plugin|>\n[{function}, ...]<|im_end|>\n             tools, after a first system message
#     <|im_start|>assistant\n{content}<|action_start|><|plugin|>\n{call}<|action_end|><|im_end|>\n
#     <|im_start|>environment name=<|plugin|>\n{content}<|im_end|>\n                what a tool gave back
# A message of the role system or environment may name `plugin` or `interpreter` itself.
INTERNLM2_CHAT_TEMPLATE = (
    f"{_TEXT}{_PLUGINS}{_CALLS}{{{{ bos_token }}}}"
    "{% if tools and messages[0]['role'] != 'system' %}{{ plugins(tools) }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ text(message) + calls(message) + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|im_start|>environment name=<|plugin|>\\n' + text(message) + '<|im_end|>\\n' }}"
    "{% elif message['role'] in ['system', 'user', 'environment'] %}"
    "{{ '<|im_start|>' + message['role'] }}"
    "{% if message['role'] != 'user' and message['name'] in ['plugin', 'interpreter'] %}"
    "{{ ' name=<|' + message['name'] + '|>' }}{% endif %}"
    "{{ '\\n' + text(message) + '<|im_end|>\\n' }}"
    "{% else %}{{ raise_exception('The roles are system, user, assistant, tool and environment; found ' "
    "~ message['role'] ~ '.') }}"
    "{% endif %}"
    "{% if tools and loop.first and message['role'] == 'system' %}{{ plugins(tools) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
