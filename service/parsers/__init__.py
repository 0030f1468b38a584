"""From generated text to messages: pure functions and state machines, without I/O."""
