"""A chat template is a program from a stranger: it runs in transformers' sandbox, or not at all."""

import json
import shutil

import pytest
from jinja2.exceptions import SecurityError, UndefinedError

import mlxquant

ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch stolen') }}",
    "{{ self.__init__.__globals__.__builtins__.open('stolen', 'w') }}",
    "{{ namespace.__init__.__globals__['os'].popen('touch stolen').read() }}",
    "{{ ('{0.__class__.__init__.__globals__}' | attr('format'))(raise_exception) }}",
    "{% set _ = messages.append({'role': 'user', 'content': 'forged'}) %}",
    "{% for i in range(10**10) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_a_template_cannot_reach_out(tmp_path, monkeypatch, tiny_folder, template):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    monkeypatch.chdir(tmp_path)
    tokenizer = mlxquant.load(str(folder)).tokenizer
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises((SecurityError, UndefinedError, OverflowError, TypeError)):
        tokenizer.apply_chat_template(messages, tokenize=False)
    assert len(messages) == 1 and [p.name for p in tmp_path.iterdir()] == ["model"]
