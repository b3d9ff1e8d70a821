//! `{names}` in a plan's texts: volumes and volume groups, which are called differently in a test.

use std::collections::BTreeMap;

/// What a name stands for.
pub(crate) type Names = BTreeMap<String, String>;

/// Puts in what the names stand for. `{{` and `}}` are braces, and `${…}` is left to the shell. Fails with the name that
/// nothing stands for.
pub(crate) fn expand(text: &str, names: &Names) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(place) = rest.find(['{', '}']) {
        let (before, from) = rest.split_at(place);
        out.push_str(before);
        if from.starts_with("{{") || from.starts_with("}}") {
            out.push_str(&from[..1]);
            rest = &from[2..];
        } else if before.ends_with('$') && from.starts_with('{') {
            let end = from.find('}').map_or(from.len(), |end| end + 1);
            out.push_str(&from[..end]);
            rest = &from[end..];
        } else if let Some((name, after)) = from.strip_prefix('{').and_then(|from| from.split_once('}')) {
            out.push_str(names.get(name).ok_or_else(|| name.to_owned())?);
            rest = after;
        } else {
            return Err(from[..1].to_owned());
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_put_in_and_unknown_ones_named() {
        let names = Names::from([("data".to_owned(), "/dev/loop7".to_owned()), ("vg".to_owned(), "v".to_owned())]);
        let good = [
            ("{data}", "/dev/loop7"),
            ("/dev/{vg}/lv", "/dev/v/lv"),
            ("awk '{{print}}' {data}", "awk '{print}' /dev/loop7"),
            ("${HOME}/{vg} $x ${unclosed", "${HOME}/v $x ${unclosed"),
            ("", ""),
        ];
        for (text, wanted) in good {
            assert_eq!(expand(text, &names).as_deref(), Ok(wanted), "{text}");
        }
        for (text, unknown) in [("{log}", "log"), ("{", "{"), ("a}b", "}"), ("{}", ""), ("{data", "{")] {
            assert_eq!(expand(text, &names), Err(unknown.to_owned()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[{}$a-c]{0,12}|\\PC{0,40}") {
            let names = Names::from([("a".to_owned(), "{b}".to_owned())]);
            // What was put in is not looked at again.
            if let Ok(out) = expand(&text, &names) {
                prop_assert!(out.len() <= text.len() * 3);
            }
        }
    }
}
