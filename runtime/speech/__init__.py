"""From sound to words, with numpy alone: WAV files, resampling, log-mel features, Whisper's prompt and rules."""
