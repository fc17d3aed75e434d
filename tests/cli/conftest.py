"""A second tiny model, and a run without the page: drawing it takes longer than all the rest."""

import pytest
import torch


@pytest.fixture(scope="session")
def other_model(tiny_model, tmp_path_factory):
    """Folder of a model of the same tokenizer and other weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("other-model")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_shape(tiny_model, tmp_path_factory):
    """Folder of a model of the same tokenizer and another width."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("other-shape")
    config = AutoConfig.from_pretrained(tiny_model)
    config.hidden_size, config.head_dim = 2 * config.hidden_size, config.hidden_size
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture
def no_report(monkeypatch):
    """Runs end without report.html."""
    monkeypatch.setattr("klimb.run.report", lambda path, watch=None: None)
