"""What is good: rewards under the contract reward(prompts, completions, **columns) -> list[float | None]."""
