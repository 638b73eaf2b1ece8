"""Tasks for language models whose rewards can be checked: prompts, answers, and worked examples to imitate first."""
